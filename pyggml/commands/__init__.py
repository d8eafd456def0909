"""The commands of the program, one file each; a module's ``command`` is what `pyggml.cli` runs."""
