"""Makes models: random mixtures of experts, and mixtures made from a dense model; quantises; writes GGUF."""
