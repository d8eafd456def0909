"""The cases of upstream's test-backend-ops (b11434) for MUL_MAT_ID and ADD_ID, as parameters.

Only for weight types that have a kernel. What is too large has fewer rows here (`MulMatId.rows`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from emulated_card import FLOATS, QUANTIZED

from pyggml.types import Type

#: types that upstream tests with every shape, and with few
BASE = ("f32", "f16", "q8_0", "q4_0", "q4_1", "q4_K", "mxfp4")
OTHER = ("q4_1", "q5_0", "q8_0", "q5_K", "q6_K", "bf16")
#: weights of a case that is run with all its rows: as float64 they take eight times as many bytes
MAX_WEIGHTS = 300_000_000


@dataclass(frozen=True)
class MulMatId:
    """One product: ``n_mats`` experts of ``m`` rows of ``k``, ``n`` tokens that use ``n_used`` each.

    Attributes
    ----------
    broadcast : bool
        Whether the experts of a token share its activations.
    amax : float
        Largest activation.
    m_v : int
        Rows an expert has in memory, of which ``m`` are used; 0 if all.
    """

    type: str
    n_mats: int
    n_used: int
    broadcast: bool
    m: int
    n: int
    k: int
    amax: float = 1.0
    m_v: int = 0

    def __str__(self) -> str:
        more = (
            ("-broadcast" if self.broadcast else "") + ("-large" if self.amax > 1 else "") + ("-view" * bool(self.m_v))
        )
        return f"{self.type}-{self.n_used}of{self.n_mats}-m{self.m}-n{self.n}-k{self.k}{more}"

    @property
    def rows(self) -> int:
        """Rows that there is memory for: all, or some of a second tile."""
        return self.m if self.n_mats * self.m * self.k <= MAX_WEIGHTS else min(self.m, 136)


def _mul_mat_id() -> list[MulMatId]:
    cases = [MulMatId("mxfp4", 8, 2, False, 32, 32, 256)]
    # tiles that are just full, or just not
    for type in ("q4_K", "f16"):
        cases += [MulMatId(type, 4, 4, False, 512, n, 256) for n in (1, 15, 16, 17, 31, 32, 33, 47, 48, 49)]
        cases.append(MulMatId(type, 8, 1, False, 512, 1, 256))
    # experts that lie apart
    cases += [MulMatId("f32", 4, 2, False, 8, 1, 64, m_v=64), MulMatId("f16", 4, 2, False, 8, 16, 64, m_v=64)]
    # many experts and tokens
    for b in (False, True):
        for type in ("f16", "bf16"):
            cases += [MulMatId(type, 16, 16, b, 32, 1024, 16), MulMatId(type, 16, 16, b, 50, 200, 64)]
        cases.append(MulMatId("f16", 2, 2, b, 32, 8192, 64))
    # rows of any length
    cases += [MulMatId("f16", 1, 1, False, 8, 16, k) for k in (1, 63, 65)]
    # shapes of models
    cases += [MulMatId(type, 32, 2, False, 2880, 32, 2880) for type in ("mxfp4", "q4_0")]
    cases += [MulMatId("q4_0", n_mats, 10, False, 256, n, 128) for n in (1, 5, 64, 300) for n_mats in (512, 1024)]
    # three blocks a row
    for type in (*FLOATS, *QUANTIZED):
        cases.append(MulMatId(type, 4, 2, False, 64, 16, 3 * Type.of(type).block_size))
    # activations beyond float16
    for n in (16, 32, 64):
        cases.append(MulMatId("q4_K", 128, 4, False, 4096, n, 2048, amax=1e5))
        cases.append(MulMatId("q8_0", 8, 2, False, 512, n, 256, amax=1e5))
    for type, n_mats, n_used, b, n in product(BASE, (4, 8), (1, 2, 4), (False, True), (1, 4, 5, 17, 32, 129)):
        cases.append(MulMatId(type, n_mats, n_used, b, 512, n, 256))
    cases += [MulMatId(type, 4, 2, False, 512, n, 256) for type in OTHER for n in (1, 32)]
    return list(dict.fromkeys(cases))


MUL_MAT_ID = _mul_mat_id()

#: one of each kind, with fewer rows: what the compiled kernels are asked in every run of the tests
QUICK = [
    *(c for c in MUL_MAT_ID if c.m == 64 or c.m_v or c.k in (1, 63, 65)),
    *(
        replace(c, m=40)
        for c in MUL_MAT_ID
        if (c.type, c.n_mats, c.n_used) in (("q8_0", 8, 4), ("f32", 4, 4), ("q4_1", 4, 1)) and c.n in (4, 5, 17)
    ),
    MulMatId("q8_0", 8, 2, False, 40, 16, 256, amax=1e5),
    MulMatId("q4_0", 512, 10, False, 8, 5, 128),
]

#: n_embd, n_mats, n_used, n_token
ADD_ID = [
    *product((32, 129), (4, 8), (1, 2, 4), (1, 32, 129)),
    *product((2880,), (128, 32), (4,), (1, 512)),
]
