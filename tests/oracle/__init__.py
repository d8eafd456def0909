"""What pyggml is held against: the real library in a child process, and a literal port of the passes."""
