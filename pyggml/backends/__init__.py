"""The backends that come with pyggml, one folder each; `pyggml.backend.REGISTRY` names them."""
