"""How a plan lies in memory: descriptors of int64 words, and the control block that its threads share.

A descriptor is a header of `HEADER` words, `N_PARAMS` parameters, and `TENSOR` words for each of dst, src0, src1, ...
Descriptors of several lengths follow each other; each says its own.
"""

from __future__ import annotations

# -- header of a descriptor
KERNEL = 0  #: address of an op kernel
LENGTH = 1  #: words of this descriptor
SERIAL = 2  #: 1 if thread 0 alone runs it
BARRIER = 3  #: 1 if all threads meet after it
INDEX = 4  #: place in the plan, for reports of errors
COUNTER = 5  #: jobs that were taken; 0 between runs
SCRATCH = 6  #: byte offset of the op's part of the shared scratch
HEADER = 8
PARAM = HEADER
N_PARAMS = 24

# -- a tensor in a descriptor
TENSOR = 10
ADDRESS, TYPE, NE0, NE1, NE2, NE3, NB0, NB1, NB2, NB3 = range(TENSOR)
DST = PARAM + N_PARAMS
SRC0, SRC1, SRC2, SRC3, SRC4 = (DST + TENSOR * i for i in range(1, 6))

# -- control block: each line of 64 bytes has one writer at a time
LINE = 8
ARRIVED, GENERATION, STOP, ABORT = (LINE * i for i in range(4))
SHARED, THREADS, THREAD_BYTES = LINE * 4, LINE * 4 + 1, LINE * 4 + 2  #: scratch: shared part, threads' parts
REQUEST, PLAN, COUNT, QUIT = LINE * 5, LINE * 6, LINE * 6 + 1, LINE * 6 + 2
DONE, SLEEPERS = LINE * 7, LINE * 8
ERRORS = LINE * 9  #: one line a thread: descriptor + 1, position, value, number of the check
ERROR_SET, ERROR_POSITION, ERROR_VALUE, ERROR_LIMIT = range(4)

# -- element types, as in files
F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 = 0, 1, 2, 3, 6, 7, 8
Q4_K, Q5_K, Q6_K, I32, I64, BF16, MXFP4 = 12, 13, 14, 26, 27, 30, 39


def control_words(n_threads: int) -> int:
    """Return the size of a control block in words."""
    return ERRORS + LINE * n_threads
