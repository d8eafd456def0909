"""The test kit: definitions, ports and oracles that pyggml is held against, for its own tests and yours."""
