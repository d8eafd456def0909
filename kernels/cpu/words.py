"""How a plan lies in memory: descriptors of int64 words, and the control block that its threads share.

A descriptor is a header of `HEADER` words, `N_PARAMS` parameters, and `TENSOR` words for each of dst, src0, src1, ...
Descriptors of several lengths follow each other; each says its own. A stage is a run of descriptors that do not need
each other's results (or are done by one thread in order); a shared descriptor is cut into as many parts as there are
threads.
"""

from __future__ import annotations

# -- header of a descriptor
KERNEL = 0  #: address of an op kernel
LENGTH = 1  #: words of this descriptor
SERIAL = 2  #: 1 if it is not shared: part 0 does it all
STAGE = 3  #: first of a stage: how many descriptors the stage has; else 0
INDEX = 4  #: place in the plan, for reports of errors
COUNTER = 5  #: jobs that were taken; 0 between runs
SCRATCH = 6  #: byte offset of the op's part of the shared scratch
PARALLEL = 7  #: first of a stage: 1 if some descriptor of the stage is shared; others: 1 if it is shared itself
HEADER = 8
PARAM = HEADER
N_PARAMS = 24

# -- a tensor in a descriptor
TENSOR = 10
ADDRESS, TYPE, NE0, NE1, NE2, NE3, NB0, NB1, NB2, NB3 = range(TENSOR)
DST = PARAM + N_PARAMS
SRC0, SRC1, SRC2, SRC3, SRC4, SRC5, SRC6 = (DST + TENSOR * i for i in range(1, 8))

# -- control block: words that several threads write have lines of 64 bytes of their own
LINE = 8
TICKET = 0  #: number of the stage << 16 | next part to be taken; see `plan`
DONE = LINE  #: parts of the stage that workers have finished
ABORT = LINE * 2  #: not 0: no further stage is begun
SLEEPERS = LINE * 3  #: workers asleep on the ticket
STAGE_AT, STAGE_COUNT = LINE * 4, LINE * 4 + 1  #: first descriptor of the stage, and how many
SHARED, THREADS, THREAD_BYTES = LINE * 5, LINE * 5 + 1, LINE * 5 + 2  #: scratch: shared part, parts' own
QUIT, TIMES = LINE * 6, LINE * 6 + 1  #: not 0: workers are to end; `plan.run`'s argument
ERRORS = LINE * 7  #: one line a part: descriptor + 1, position, value, limit
ERROR_SET, ERROR_POSITION, ERROR_VALUE, ERROR_LIMIT = range(4)

# -- element types, as in files
F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 = 0, 1, 2, 3, 6, 7, 8
Q2_K, Q3_K, Q4_K, Q5_K, Q6_K = range(10, 15)
IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S, IQ4_NL, IQ3_S, IQ2_S, IQ4_XS = range(16, 24)
I32, I64, IQ1_M, BF16 = 26, 27, 29, 30
TQ1_0, TQ2_0, MXFP4, NVFP4, Q1_0, Q2_0 = 34, 35, 39, 40, 41, 42


def control_words(n_threads: int) -> int:
    """Return the size of a control block in words."""
    return ERRORS + LINE * n_threads
