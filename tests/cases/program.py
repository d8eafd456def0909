"""Graphs of cases from programs: lists of small tuples of numbers, which an interpreter turns into tensors.

A strategy that draws programs shrinks by removing instructions, so that failing examples are small.
"""

from __future__ import annotations

from dataclasses import dataclass

from .graph import CaseGraph, CaseStatic, CaseTensor

__all__ = ["HEADS", "INSTRUCTIONS", "N_KV", "N_ROWS", "Instruction", "Weights", "interpret"]

HEADS = 4
N_KV = 64
N_ROWS = 96  #: of the embedding

#: A kind, and three numbers that choose sources and forms.
Instruction = tuple[str, int, int, int]
INSTRUCTIONS = (
    *(
        "add",
        "bias",
        "norm",
        "unary",
        "scale",
        "mul_mat",
        "mul_mat",
        "moe",
        "moe",
        "moe",
        "reshape",
        "rope",
        "soft_max",
    ),
    *("get_rows", "set_rows", "cpy", "slice", "flash_attn", "concat", "clamp", "inplace", "output", "glu"),
)


@dataclass(frozen=True)
class Weights:
    """The static tensors that a program's instructions choose from."""

    static: CaseStatic
    n_embd: int
    n_expert: int
    n_used: int
    dense: list[CaseTensor]
    experts: list[CaseTensor]
    expert_bias: list[CaseTensor]
    norms: list[CaseTensor]
    caches: list[CaseTensor]
    embedding: CaseTensor
    freqs: CaseTensor
    sinks: CaseTensor


def interpret(program: list[Instruction], w: Weights, n_token: int) -> tuple[CaseGraph, list[str]]:
    """Turn a program into a graph.

    Returns
    -------
    CaseGraph
        Every activation is f32, ``(n_embd, n_token)``.
    list of str
        Tensors that contain expert ids after computing.
    """
    return _Interpreter(w, n_token).run(program)


class _Interpreter:
    def __init__(self, w: Weights, n_token: int) -> None:
        self.w, self.n, self.g = w, n_token, CaseGraph()
        g, n = self.g, n_token
        self.positions = g.input("pos", "i32", [n])
        self.tokens = g.input("tok", "i32", [n])
        self.rows = g.input("rows", "i64", [n])
        self.mask = g.input("mask", "f16", [N_KV, n])
        self.ids = g.input("ids", "i32", [w.n_used, n])
        embd = g.input("embd", "f32", [w.n_embd, n])
        self.acts = [embd, g.get_rows(w.embedding, self.tokens, "embedded")]
        self.id_nodes: list[str] = []

    def run(self, program: list[Instruction]) -> tuple[CaseGraph, list[str]]:
        g = self.g
        for kind, i, j, k in program:
            a = self.acts[-1 - i % len(self.acts)]
            y = getattr(self, f"_{kind}")(a, j, k)
            if y is None:
                continue
            if y.op == "VIEW":
                y = g.cont(y)
            self.acts.append(y)
        last = self.acts[-1]
        if last.op != "NONE" and last.view is None:
            last.flags.append("output")
        g.results.append(last)
        return g, self.id_nodes

    def _other(self, j: int) -> CaseTensor:
        return self.acts[-1 - j % len(self.acts)]

    def _slice(self, a: CaseTensor, j: int, k: int) -> None:
        m = min(self.n, max(1, self.n // 2))
        part = self.g.view(a, [self.w.n_embd, m], a.nb, offs=a.nb[1] * (self.n - m))
        done = self.g.same("UNARY", part) if j % 2 else self.g.cont(part)
        if k % 2:
            done.flags.append("output")
        self.g.results.append(done)

    def _add(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        return self.g.same(("ADD", "MUL", "SUB")[k % 3], a, self._other(j))

    def _bias(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        return self.g.same(("ADD", "MUL")[k % 2], a, self.w.norms[j % len(self.w.norms)])

    def _norm(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        y = self.g.same("RMS_NORM", a)
        return self.g.same("MUL", y, self.w.norms[j % len(self.w.norms)]) if k % 3 else y

    def _unary(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        return self.g.same("UNARY", a)

    def _scale(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        return self.g.same("SCALE", a)

    def _clamp(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        return self.g.same("CLAMP", a)

    def _inplace(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        if a.op == "NONE":  # a computed result only: inputs are not overwritten
            a = self.g.same("SCALE", a)
        return self.g.inplace(("SCALE", "CLAMP", "ADD")[k % 3], a, *([self._other(j)] if k % 3 == 2 else []))

    def _output(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        y = self.g.same("SCALE", a)
        y.flags.append("output")
        return y

    def _mul_mat(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        g, d = self.g, self.w.n_embd
        y = g.mul_mat(self.w.dense[j % len(self.w.dense)], a)
        if y.ne[0] == d:
            return y
        return g.glu(g.view(y, [d, self.n], y.nb), g.view(y, [d, self.n], y.nb, offs=4 * d))

    def _glu(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        return self.g.glu(a, self._other(j))

    def _reshape(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        g, d = self.g, self.w.n_embd
        y = g.permute(g.reshape(a, [d // HEADS, HEADS, self.n]), [0, 2, 1, 3])
        return g.reshape(g.cont(y), [d, self.n])

    def _rope(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        g, d = self.g, self.w.n_embd
        y = g.reshape(a, [d // HEADS, HEADS, self.n])
        y = g.same("ROPE", y, self.positions, *([self.w.freqs] if k % 2 else []))
        return g.reshape(y, [d, self.n])

    def _soft_max(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        return self.g.same("SOFT_MAX", a)

    def _get_rows(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        return self.g.get_rows(a, self.positions)

    def _set_rows(self, a: CaseTensor, j: int, k: int) -> None:
        self.g.results.append(self.g.set_rows(self.w.caches[j % 2], a, self.rows))

    def _cpy(self, a: CaseTensor, j: int, k: int) -> None:
        g, d, m = self.g, self.w.n_embd, min(self.n, N_KV)
        cache = self.w.caches[j % 2]
        g.results.append(g.cpy(g.view(a, [d, m], a.nb), g.view(cache, [d, m], cache.nb)))

    def _flash_attn(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        g, d = self.g, self.w.n_embd
        dh = d // HEADS
        q = g.permute(g.reshape(a, [dh, HEADS, self.n]), [0, 2, 1, 3])
        nb = [2, 2 * d, 2 * dh, 2 * d * N_KV]
        kk, vv = (g.view(cache, [dh, N_KV, HEADS], nb) for cache in self.w.caches)
        o = g.flash_attn(q, kk, vv, self.mask, self.w.sinks if k % 2 else None)
        return g.reshape(o, [d, self.n])

    def _concat(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        g, d = self.g, self.w.n_embd
        y = g.new("f32", [2 * d, self.n], "CONCAT", (a, self._other(j)))
        return g.view(y, [d, self.n], y.nb, offs=(0, 4 * d)[k % 2])

    def _moe(self, a: CaseTensor, j: int, k: int) -> CaseTensor:
        g, w, d, n = self.g, self.w, self.w.n_embd, self.n
        ids = self.ids
        if j % 3:
            logits = g.mul_mat(w.dense[j % len(w.dense)], a)
            order = g.argsort(g.cont(g.view(logits, [w.n_expert, n], logits.nb)))
            ids = g.view(order, [w.n_used, n], order.nb)
            self.id_nodes.append(order.id)
        x = g.reshape(a, [d, 1, n])
        y = g.mul_mat_id(w.experts[k % len(w.experts)], x, ids)
        if k % 4 == 1:
            y = g.same("ADD_ID", y, w.expert_bias[j % 2], ids)
        if k % 3:
            y = g.glu(y, g.mul_mat_id(w.experts[(k + 1) % len(w.experts)], x, ids))
        if k % 3 == 2:
            y = g.mul_mat_id(w.experts[(k + 2) % len(w.experts)], y, ids)
        nb = [4, y.nb[2], y.nb[2] * n, y.nb[2] * n]
        parts = [g.view(y, [d, n], nb, offs=y.nb[1] * e) for e in range(w.n_used)]
        total = parts[0]
        for part in parts[1:]:
            total = g.same("ADD", total, part)
        return total
