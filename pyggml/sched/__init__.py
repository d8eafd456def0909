"""The scheduler: assign, split, allocate, compute.

Read `state` first, then `scheduler`, `assign`, `split`, `compute`, `experts` and `policies`.
"""
