"""pyggml against the real library, op by op and call by call."""
