"""CUDA kernels: generated Python source, compiled by numba-cuda to PTX; neither a driver nor a card is needed.

From the bottom up: `intrinsics` (instructions that numba-cuda lacks), `formats` (how weight types are decoded), `mmvq`,
`tile` and `float_tile` (the two matrix products), `rows`, `reduce`, `rope` and `copies` (ops on rows), `compiler` (PTX
of a kernel by name, kept in the user's cache), `launch` (the kernels of an op). Importing this package imports nothing.
"""
