"""The test kit: definitions of ops, Hypothesis strategies, headers of large models, a PTX emulator, an RPC server."""
