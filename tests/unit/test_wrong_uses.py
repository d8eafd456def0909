"""Wrong uses of the Python API: each is one error of pyggml's that says what was wrong and what to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import pyggml as ggml
from pyggml.commands.make_moe import command as make_moe
from pyggml.gguf import ValueType
from pyggml.makers.gguf_writer import GGUFWriter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small random model."""
    path = tmp_path_factory.mktemp("model") / "small.gguf"
    make_moe.main([str(path), "--layers", "1", "--embd", "64", "--vocab", "320"], standalone_mode=False)
    return path


def _alloc_with_usage(usage: str) -> None:
    context = ggml.Context()
    context.new_tensor("f32", (4,))
    context.alloc(ggml.CPU(threads=1), usage=usage)


def _compute(build: Callable[[ggml.Graph], ggml.Tensor]) -> None:
    graph = ggml.Graph()
    with graph:
        y = build(graph)
    graph.expand(y)
    sched = ggml.Scheduler([ggml.CPU(threads=1)])
    sched.alloc_graph(graph)
    for leaf in graph.leafs:
        leaf.set_array(np.ones(leaf.shape))
    sched.compute(graph)


def _rope(base: float, n_ctx_orig: int, ext_factor: float, scale: float = 1.0) -> None:
    _compute(
        lambda g: ggml.rope_ext(
            g.input("f32", (8, 2, 4)),
            g.input("i32", (4,)),
            None,
            8,
            0,
            n_ctx_orig,
            base,
            scale,
            ext_factor,
            1.0,
            32.0,
            1.0,
        )
    )


def _sections(sections: object) -> None:
    x, pos = ggml.Tensor("f32", (8, 2, 4)), ggml.Tensor("i32", (16,))
    ggml.rope_multi(x, pos, None, 8, sections, 8, 0, 10000.0, 1.0, 0.0, 1.0, 32.0, 1.0)


def _write(kind: str, value: object) -> None:
    with ggml.Context() as context:
        t = context.new_tensor(kind, (1,), name="t")
        context.alloc(ggml.CPU(threads=1))
        t.set_array([value])


_X = ggml.Tensor("f32", (8, 4), name="x")

WRONG: dict[str, tuple[Callable[[], object], type[ggml.PyggmlError], str]] = {
    "a type that is none": (lambda: ggml.Tensor("f33", (4,)), ggml.errors.GraphError, r"no type is called 'f33' \(there are f32,"),
    "a usage that is none": (lambda: _alloc_with_usage("wieghts"), ggml.errors.GraphError, r"'wieghts' \(there are any, weights"),
    "a number for a type": (lambda: ggml.Tensor(3, (4,)), ggml.errors.GraphError, "no type is called 3"),
    "a number for dimensions": (lambda: ggml.Tensor("f32", 4), ggml.errors.ShapeError, r"dimensions cannot be 4 \(such as"),
    "a name for memory": (lambda: ggml.Context().alloc("cpu"), ggml.errors.GraphError, r"cannot be 'cpu' \(such as pyggml.CPU"),
    "a tensor for a graph": (lambda: ggml.Scheduler([ggml.CPU(threads=1)]).alloc_graph(_X), ggml.errors.SchedError, "the graph cannot be <f32 'x'"),
    "one backend": (lambda: ggml.Scheduler(ggml.CPU(threads=1)), ggml.errors.SchedError, r"the backends cannot be <CPU.*give a list"),
    "tokens for a context": (lambda: ggml.Planner.open("qwen3-0.6b", devices="rtx3060", context=4096, data=False), ggml.errors.GraphError, "context cannot be 4096"),
    "elements below none": (lambda: ggml.Tensor("f32", (-4, 3)), ggml.errors.ShapeError, "cannot have -4 elements"),
    "elements of a part": (lambda: ggml.Tensor("f32", (4.5, 3)), ggml.errors.ShapeError, r"dimensions are whole numbers, not \[4.5, 3\]"),
    "a text for dimensions": (lambda: ggml.Graph().input("f32", "ab"), ggml.errors.ShapeError, r"whole numbers, not \['a', 'b'\]"),
    "a list of results": (lambda: ggml.Graph().expand([_X]), ggml.errors.GraphError, r"expand: \[.*\] is not a tensor \(give each"),
    "no result": (lambda: ggml.Graph().expand(None), ggml.errors.GraphError, "expand: None is not a tensor"),
    "rows of broken blocks": (lambda: ggml.Tensor("q4_0", (33, 2)), ggml.errors.ShapeError, "a row of 33 elements does not consist of whole"),
    "a name for a backend": (lambda: ggml.Scheduler(["cpu"]), ggml.errors.SchedError, r"'cpu' is no backend \(pyggml.CPU\(\)"),
    "a text for a dialect": (lambda: ggml.Scheduler([ggml.CPU(threads=1)], dialect="0.26"), ggml.errors.SchedError, "'0.26' is not a dialect"),
    "no backend": (lambda: ggml.Scheduler([]), ggml.errors.SchedError, "needs at least one backend"),
    "a device that is none": (lambda: ggml.Sim("rtx9999"), ggml.errors.DeviceUnavailableError, "no such profile"),
    "no thread": (lambda: ggml.CPU(threads=0), ggml.errors.DeviceUnavailableError, "0 threads cannot compute"),
    "a function that is none": (lambda: ggml.unary(_X, -1), ggml.errors.ShapeError, r"UnaryOp: there is no -1; the values are 0 \(ABS\)"),
    "a gate that is none": (lambda: ggml.glu(_X, 1000, False), ggml.errors.ShapeError, "GluOp: there is no 1000"),
    "a triangle that is none": (lambda: ggml.tri(ggml.Tensor("f32", (4, 4)), 16), ggml.errors.ShapeError, "TriType: there is no 16"),
    "a range without end": (lambda: ggml.arange(0.0, float("inf"), 1.0), ggml.errors.ShapeError, "too many elements"),
    "a range of steps too small": (lambda: ggml.arange(0.0, 1e30, 1.0), ggml.errors.ShapeError, "too many elements"),
    "sections that are one number": (lambda: _sections(3), ggml.errors.ShapeError, "sections must be 4 numbers"),
    "sections that are three": (lambda: _sections((1, 1, 1)), ggml.errors.ShapeError, "sections must be 4 numbers"),
    "no groups": (lambda: _compute(lambda g: ggml.group_norm(g.input("f32", (4, 4, 4)), 0, 1e-5)), ggml.errors.UnsupportedOpError, "f32"),
    "a base frequency of 0": (lambda: _rope(0.0, 0, 0.0), ggml.errors.UnsupportedOpError, "cannot run ROPE"),
    "a base frequency below 0": (lambda: _rope(-1.0, 0, 0.0), ggml.errors.UnsupportedOpError, "cannot run ROPE"),
    "YaRN without a trained context": (lambda: _rope(1e4, 0, 1.0), ggml.errors.UnsupportedOpError, "cannot run ROPE"),
    "YaRN with no scale": (lambda: _rope(1e4, 64, 1.0, 0.0), ggml.errors.UnsupportedOpError, "cannot run ROPE"),
    **{
        f"{value} into {kind}": (lambda kind=kind, value=value: _write(kind, value), ggml.errors.GraphError, f"'t' is {kind} and cannot hold")
        for kind, value in (
            ("i32", 2**31), ("i32", -(2**31) - 1), ("i32", 1.5), ("i32", float("nan")), ("i32", float("inf")), ("i8", 128),
            ("i8", 0.5), ("i16", -32769), ("i64", 1e30),
        )
    },
    "a text into i32": (lambda: _write("i32", "one"), ggml.errors.GraphError, "cannot be written into it"),
    "no file": (lambda: ggml.Session.open("nowhere.gguf"), ggml.errors.FormatError, r"no such file \(check the path"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_uses_are_told(name: str) -> None:
    """The error is of pyggml's own kinds, in one line."""
    use, kind, text = WRONG[name]
    with pytest.raises(kind, match=text) as caught:
        use()
    assert "\n" not in str(caught.value)


def test_the_cpu_is_no_device_beside_itself(model: Path) -> None:
    """`devices` are those beside the CPU: naming it there would give it a device's share of the layers."""
    with pytest.raises(ggml.errors.DeviceUnavailableError, match='remove "cpu" from the devices'):
        ggml.Session.open(model, devices=["sim", "cpu"])


def test_one_device_may_be_named_without_a_list(model: Path) -> None:
    """A text is one device's name, not a list of letters."""
    with ggml.Session.open(model, devices="sim") as session:
        assert [b.name for b in session.backends] == ["SIM0", "CPU"]


def test_a_closed_file_is_told(model: Path) -> None:
    """A file that was closed cannot be opened as a session."""
    file = ggml.GGUFFile.open(model)
    file.close()
    with pytest.raises(ggml.errors.FormatError, match=r"was closed \(open it again\)"):
        ggml.Session.open(file)


@pytest.mark.parametrize("tokens", [[2**31], [-(2**31) - 1], [2**70], ["a"], [1, 2**40]])
def test_ids_that_no_token_has_are_refused(model: Path, tokens: list[object]) -> None:
    """An id beyond 32 bits, or none at all, is an error before anything is computed, and the session goes on."""
    with ggml.Session.open(model) as session:
        with pytest.raises(ggml.errors.GraphError):
            session.decode(tokens)
        assert np.isfinite(session.decode([5])).all()


#: Keys of a model's file with values of a wrong kind or size.
KEYS: dict[str, tuple[ValueType, object]] = {
    "attention.head_count": (ValueType.STRING, ["4"]),
    "expert_group_count": (ValueType.FLOAT32, [float("inf")]),
    "embedding_length": (ValueType.FLOAT32, [float("nan")]),
    "context_length": (ValueType.UINT32, 2**31),
    "rope.freq_base": (ValueType.FLOAT32, 0.0),
    "rope.scaling.factor": (ValueType.FLOAT32, 1e-45),
    "attention.layer_norm_rms_epsilon": (ValueType.FLOAT64, 1e300),
}


@pytest.mark.parametrize("key", KEYS)
def test_hyper_parameters_of_a_wrong_kind_are_named(model: Path, tmp_path: Path, key: str) -> None:
    """A key that is an array, a text, infinite or zero where that cannot be is one error that names it."""
    kind, value = KEYS[key]
    writer = GGUFWriter()
    with ggml.GGUFFile.open(model) as file:
        arch = file.metadata["general.architecture"]
        for name in file.metadata:
            if name != f"{arch}.{key}":
                entry = file.metadata.entry(name)
                writer.add_raw(name, entry.type, entry.length, file.metadata.raw(name))
        (writer.add_array if isinstance(value, list) else writer.add)(f"{arch}.{key}", kind, value)
        for info in file.tensors.values():
            n = max(i + 1 for i in range(4) if i == 0 or info.ne[i] != 1)
            writer.add_tensor(
                info.name, info.type, info.ne[:n], partial(lambda raw: [raw.tobytes()], file.data(info.name).copy())
            )
        writer.write(tmp_path / "odd.gguf")
    with pytest.raises(ggml.errors.FormatError, match=key):
        ggml.Session.open(tmp_path / "odd.gguf")


def _moved(context: ggml.Context, w: ggml.Tensor, cpu: ggml.CPU) -> list[ggml.Context]:
    """Free the memory of a context's only tensor, and allocate it elsewhere; return what is where it was."""
    before, others = w.data, []
    context.close()
    for _ in range(100):
        others.append(ggml.Context())
        other = others[-1].new_tensor("f32", (64, 4))
        others[-1].alloc(cpu)
        if other.data == before:
            break
    context.alloc(cpu)
    return others


def test_a_view_of_memory_that_moved_is_told_or_follows() -> None:
    """A view keeps no address of memory that its tensor had before: reading it is an error, and the next allocation gives it the new one."""
    cpu, context, graph = ggml.CPU(threads=1), ggml.Context(), ggml.Graph()
    with graph:
        w = graph.input("f32", (64, 4), name="w")
        v = ggml.view_2d(w, 64, 2, w.nb[1], w.nb[1])
        y = ggml.scale(v, 2.0)
    graph.expand(y)
    context.add(w)
    context.alloc(cpu)
    first, second = ggml.Scheduler([cpu]), ggml.Scheduler([cpu])
    first.alloc_graph(graph)
    others: list[ggml.Context] = []
    for sched in (first, second):
        others += _moved(context, w, cpu)
        assert v.is_stale_view
        for use in (v.numpy, lambda: v.set_array(np.zeros((2, 64))), lambda: cpu.graph_compute(graph.view(0, 2))):
            with pytest.raises(ggml.errors.BackendError, match=r"'w \(view\)' views memory that 'w' had before"):
                use()
        w.set_array(np.arange(256).reshape(4, 64))
        sched.reset()
        sched.alloc_graph(graph)
        sched.compute(graph)
        assert y.numpy()[:, 0].tolist() == [128.0, 256.0]


def test_an_input_written_in_place_follows_after_close() -> None:
    """A closed scheduler leaves no memory behind in views of inputs: the next compute writes where the input is."""
    graph = ggml.Graph()
    with graph:
        x = graph.input("f32", (64,), name="x")
        y = ggml.add_inplace(x, x)
    graph.expand(y)
    sched = ggml.Scheduler([ggml.CPU(threads=1)])
    for _ in range(2):
        sched.alloc_graph(graph)
        assert y.data == x.data
        x.set_array(np.ones(64))
        sched.compute(graph)
        assert y.numpy().tolist() == [2.0] * 64
        sched.close()
        assert x.data is y.data is None
