"""The backends that come with pyggml, one file each; `pyggml.backend.REGISTRY` names them."""
