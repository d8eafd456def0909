"""The test kit: definitions of ops, random cases of each, a PTX emulator, a fake CUDA driver, an RPC server."""
