"""Models: hyper-parameters, weights and their placement, the KV cache, and graphs as llama.cpp builds them."""
