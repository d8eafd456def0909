"""One module for each family that pyggml builds; each ends in an `Architecture` and is found by that."""
