"""CUDA kernels: Python source, generated and compiled by numba-cuda to PTX; neither a driver nor a card is needed.

From the ground up: `intrinsics` (instructions that numba-cuda lacks), `formats` (how a weight type is taken apart),
`mmvq`, `tile` and `float_tile` (the two matrix products), `rows`, `reduce`, `rope` and `copies` (everything that works
row by row), `compiler` (PTX of a kernel by name, kept in the user's cache), `launch` (which kernels an op is). Importing
this package imports nothing.
"""
