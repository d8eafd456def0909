"""Makers of models: random mixtures of experts, a dense model made into one, quantisation, the GGUF writer."""
