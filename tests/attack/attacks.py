"""One kind of attack, many times, in this process: ``python -m tests.attack.attacks KIND FIRST N [FOLDER]``.

Every case has a number, which is its seed. A case passes if it ends with an error of pyggml's or with the right result; a
hang ends the process with a traceback. The last line is a count of endings as JSON, with the cases that failed.
"""

from __future__ import annotations

import faulthandler
import json
import random
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pyggml.kernels.cpu.kernel import warm_up

import pyggml as ggml
from pyggml import ops
from pyggml.backend import REGISTRY
from pyggml.makers.make_moe import ARCHS, Recipe, Sizes, make_moe
from pyggml.session import ContextFlags
from pyggml.types import Type
from tests.attack.command_attacks import names, outputs

#: Seconds of processor time that a case may take, and of a clock on the wall, as other processes may be at work.
LIMIT_S, WALL_LIMIT_S = 30, 120
#: Bytes of address space: what asks for more than this machine has must say so itself.
MEMORY = 48 << 30
TINY = Sizes(layers=2, embd=64, heads=4, kv_heads=2, head_dim=16, ff=96, ff_exp=32, experts=8, used=3)

# -- damaged files -----------------------------------------------------------------


def _damage(raw: bytearray, n_header: int, rng: random.Random) -> bytes:
    """Return a file with a few bytes of its header changed, moved, doubled or cut off."""
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(n_header)
        how = rng.randrange(6)
        if how == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            raw[at] = rng.choice((0, 1, 2, 127, 128, 255))
        elif how == 2:  # a number of 8 bytes, as counts and offsets are
            raw[at : at + 8] = rng.choice((0, 1, 2**31, 2**32, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
        elif how == 3:  # a float, as scales and bases are
            raw[at : at + 4] = np.float32(rng.choice((0, -1, np.inf, np.nan, 1e38, 1e-45))).tobytes()
        elif how == 4:
            del raw[at : at + rng.randrange(1, 40)]
        else:
            raw[at:at] = raw[max(0, at - 20) : at]
    return bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.05 else raw)


def damaged_file(seed: int, folder: Path) -> str:
    """Open a damaged model file, decode three tokens if it loads, and plan a batch."""
    rng = random.Random(seed)
    arch = sorted(ARCHS)[seed % len(ARCHS)]
    plain = folder / f"{arch}.gguf"
    if not plain.exists():
        make_moe(plain, Recipe(arch, Type.F32, seed=11, sizes=TINY))
    raw = bytearray(plain.read_bytes())
    with ggml.GGUFFile.open(plain) as file:
        n_header = min(info.offset for info in file.tensors.values())
    path = folder / "damaged.gguf"
    path.write_bytes(_damage(raw, min(n_header, len(raw) - 1), rng))
    context = ContextFlags(n_ctx=64)
    with ggml.Session.open(path, devices=["sim"] if rng.random() < 0.3 else [], context=context) as session:
        session.decode([5, 6, 7])
    return "ran"


# -- graphs --------------------------------------------------------------------------

_KINDS = ("f32", "f32", "f32", "f16", "bf16", "q4_0", "q8_0", "q4_K", "iq4_xs", "i32", "i64")
Build = Callable[[random.Random, list[ggml.Tensor]], ggml.Tensor]


def _one(rng: random.Random, made: list[ggml.Tensor]) -> ggml.Tensor:
    return made[-1 - min(int(rng.expovariate(0.7)), len(made) - 1)]


def _number(rng: random.Random) -> int:
    return rng.choice((0, 1, 1, 2, 3, 4, 4, 8, 16, 64, 256, -1, 2**31, 2**40))


def _step(rng: random.Random, made: list[ggml.Tensor]) -> ggml.Tensor:
    """Return an op of tensors made before; its arguments fit mostly."""
    a, b = _one(rng, made), _one(rng, made)
    same = a if rng.random() < 0.7 else b
    row = a.nb[1]
    choices: list[Callable[[], ggml.Tensor]] = [
        lambda: ops.add(a, same), lambda: ops.mul(a, same), lambda: ops.sub(a, same), lambda: ops.add_inplace(a, same),
        lambda: ops.scale(a, rng.uniform(-2, 2)), lambda: ops.scale_inplace(a, rng.uniform(-2, 2)), lambda: ops.sqr(a),
        lambda: ops.silu(a), lambda: ops.silu_inplace(a), lambda: ops.rms_norm(a, 1e-5), lambda: ops.soft_max(a),
        lambda: ops.mul_mat(b, a), lambda: ops.mul_mat(a, same), lambda: ops.sum_rows(a), lambda: ops.cont(a), lambda: ops.argsort(a, 0),
        lambda: ops.cast(a, rng.choice(_KINDS)), lambda: ops.cpy(a, same), lambda: ops.concat(a, same, rng.randrange(5)),
        lambda: ops.view_2d(a, max(1, a.ne[0] // 2), max(1, a.ne[1] - 1), row, rng.choice((0, 0, row, 4))),
        lambda: ops.view_2d(a, _number(rng), _number(rng), _number(rng), _number(rng)),
        lambda: ops.view_1d(a, _number(rng), _number(rng)), lambda: ops.permute(a, *rng.sample(range(4), 4)), lambda: ops.transpose(a),
        lambda: ops.reshape_2d(a, a.numel // max(1, a.ne[0]), a.ne[0]), lambda: ops.reshape_1d(a, _number(rng)),
        lambda: ops.get_rows(a, b), lambda: ops.diag_mask_inf(a, _number(rng)), lambda: ops.repeat_4d(a, *(_number(rng) for _ in range(4))),
        lambda: ops.clamp(a, 0.0, 1.0), lambda: ops.unary(a, rng.randrange(-2, 30)), lambda: ops.glu(a, rng.randrange(-1, 9), False),
        lambda: ops.set_2d_inplace(a, b, row, _number(rng)), lambda: ops.cumsum(a), lambda: ops.rope(a, b, _number(rng), rng.choice((0, 2, 1, 40))),
    ]  # fmt: skip
    return rng.choice(choices)()


def _program(seed: int, *, wild: bool) -> tuple[ggml.Graph, list[ggml.Tensor]]:
    """Return a random graph, and its inputs; the same seed gives the same one again."""
    rng = random.Random(seed)
    graph = ggml.Graph()
    inputs: list[ggml.Tensor] = []
    with graph:
        for i in range(rng.randrange(1, 4)):
            kind = rng.choice(_KINDS) if wild else "f32"
            ne = [rng.choice((256, 256, 64, 8)), rng.choice((4, 4, 1, 6)), rng.choice((1, 1, 2))]
            inputs.append(graph.input(kind, ne, name=f"x{i}"))
        made = list(inputs)
        for _ in range(rng.randrange(1, 14)):
            try:
                made.append(_step(rng, made))
            except ggml.PyggmlError:
                if wild and rng.random() < 0.1:
                    raise
            if rng.random() < 0.1:
                made[-1].set_output()
    result = made[-1]
    result.set_output()
    graph.expand(*(t for t in made if t.op is not ggml.Op.NONE), result)
    return graph, inputs


def _fill(inputs: list[ggml.Tensor], seed: int) -> None:
    rng = np.random.default_rng(seed)
    for x in inputs:
        if x.storage is None:
            continue  # the graph does not need it
        if x.type in (Type.I32, Type.I64):
            x.set_array(rng.integers(0, 2, x.shape))
        elif x.type in (Type.Q4_K, Type.IQ4_XS):
            x.buffer.memset_tensor(x, 0, 0, x.nbytes)
        else:
            x.set_array(rng.uniform(-1, 1, x.shape))


def _alone(seed: int, *, wild: bool) -> list[np.ndarray | None]:
    """Compute a program on the CPU alone, every node an output; return the results, None for what is no output."""
    graph, inputs = _program(seed, wild=wild)
    sched = ggml.Scheduler([_CPU])
    sched.alloc_graph(graph)
    _fill(inputs, seed)
    sched.compute(graph)
    return [node.numpy() if node.flags & 2 and not node.is_view else None for node in graph.nodes]


_CPU = ggml.CPU(threads=1)


def wrong_use(seed: int, folder: Path) -> str:
    """Build a graph with arguments that may not fit, and use it in a random and perhaps wrong order."""
    rng = random.Random(seed)
    graph, inputs = _program(seed, wild=True)
    context = ggml.Context()
    sched = ggml.Scheduler([ggml.Sim("rtx4090-pcie4"), _CPU], parallel=rng.random() < 0.2)
    calls: list[Callable[[], object]] = [
        lambda: sched.alloc_graph(graph), lambda: sched.compute(graph), lambda: _fill(inputs, seed), sched.reset,
        lambda: sched.reserve(graph), lambda: graph.nodes[-1].numpy(), lambda: inputs[0].numpy(), lambda: graph.nodes.reverse(),
        lambda: graph.nodes.pop(), lambda: graph.expand(ops.scale(graph.nodes[-1], 2.0)), lambda: rng.choice(graph.nodes).src.clear(),
        lambda: rng.choice(graph.nodes).src.append(inputs[0]), lambda: setattr(rng.choice(graph.nodes), "op_params", (_number(rng) % 99,)),
        lambda: sched.set_tensor_backend(rng.choice(graph.nodes), rng.choice(sched.backends)), sched.close,
        lambda: context.alloc(_CPU), context.close, lambda: context.add(inputs[0]), lambda: rng.choice(graph.nodes).set_output(),
        lambda: sched.backends[1].graph_compute(graph.view(0, len(graph.nodes))), lambda: sched.splits and sched.splits[0].graph.nodes,
        lambda: inputs[0].set_array(np.full(inputs[0].shape, rng.choice((1.5, np.nan, 2.0**40)))), lambda: rng.choice(graph.nodes).tobytes(),
    ]  # fmt: skip
    good: list[Callable[[], object]] = [calls[0], calls[2], calls[1], calls[5]]
    endings: Counter[str] = Counter()
    for call in [c for g in good for c in ([g] if rng.random() < 0.6 else [rng.choice(calls), g])] + rng.choices(
        calls, k=6
    ):
        try:
            call()
            endings["done"] += 1
        except ggml.PyggmlError as error:
            endings[type(error).__name__] += 1
        except IndexError:
            if graph.nodes:
                raise
    return "refused" if len(endings) > 1 else "ran"


def pins(seed: int, folder: Path) -> str:
    """Pin nodes anywhere, offer devices anything, and compare with the CPU alone: an error, or the same numbers."""
    rng = random.Random(seed)
    wild = rng.random() < 0.5
    graph, inputs = _program(seed, wild=wild)
    names = [rng.choice(("sim:rtx4090-pcie4", "sim:h100-pcie5", "libggml:CPU")) for _ in range(rng.randrange(1, 3))]
    gpus = [REGISTRY.open(name).backend() for name in dict.fromkeys(names)]
    sched = ggml.Scheduler(
        [*gpus, _CPU],
        parallel=rng.random() < 0.3,
        offload_rule=(lambda b, t: rng.random() < 0.5) if rng.random() < 0.5 else None,
    )
    for node in graph.nodes:
        if rng.random() < 0.4:
            sched.set_tensor_backend(node, rng.choice(sched.backends))
    sched.alloc_graph(graph)
    _fill(inputs, seed)
    sched.compute(graph)
    found = [node.numpy() if node.flags & 2 and not node.is_view else None for node in graph.nodes]
    tolerance = 2e-2 if "libggml:CPU" in names else 1e-5
    for node, ours, want in zip(graph.nodes, found, _alone(seed, wild=wild), strict=True):
        if ours is not None and want is not None and ours.dtype.kind == "f":
            np.testing.assert_allclose(
                ours,
                want,
                rtol=tolerance,
                atol=tolerance * np.abs(want[np.isfinite(want)]).max(initial=0),
                err_msg=repr(node),
            )
    return "ran"


KINDS: dict[str, Callable[[int, Path], str]] = {
    "files": damaged_file,
    "uses": wrong_use,
    "pins": pins,
    "names": names,
    "outputs": outputs,
}


def main(first: int, folder: Path, n_of: dict[str, int]) -> None:
    """Run n cases of each kind, and print how they ended."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warm_up()  # what is compiled once is no hang
    endings: dict[str, Counter[str]] = {kind: Counter() for kind in n_of}
    failed: list[str] = []
    for kind, seed in [(kind, first + i) for kind, n in n_of.items() for i in range(n)]:
        sys.stderr.write(f"{kind} {seed}\n")
        faulthandler.dump_traceback_later(WALL_LIMIT_S, exit=True)
        start_s = time.process_time()
        try:
            with np.errstate(all="ignore"):
                endings[kind][KINDS[kind](seed, folder)] += 1
        except ggml.PyggmlError as error:
            endings[kind][type(error).__name__] += 1
        except Exception as error:  # noqa: BLE001  (what is looked for)
            failed.append(
                f"{kind} {seed}: {type(error).__name__}: {str(error)[:300]} at {traceback.format_exc().splitlines()[-3].strip()}"
            )
        faulthandler.cancel_dump_traceback_later()
        if time.process_time() - start_s > LIMIT_S:
            failed.append(f"{kind} {seed}: took {time.process_time() - start_s:.0f} s")
    print(json.dumps({"endings": endings, "failed": failed}))


if __name__ == "__main__":
    main(
        int(sys.argv[1]),
        Path(sys.argv[2]),
        {kind: int(n) for kind, _, n in (word.partition("=") for word in sys.argv[3:])},
    )
