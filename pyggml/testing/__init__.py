"""The test kit: definitions of ops, strategies of cases, headers of large models, an emulator of PTX, a server of ggml's RPC."""
