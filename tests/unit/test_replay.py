"""Cases that are refused, what a replay does where a step fails, and traces as files."""

from __future__ import annotations

import copy
import gzip
import json
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from pyggml.commands.replay import command
from pyggml.dialect import DIALECTS
from pyggml.errors import FormatError
from pyggml.replay import parse_case, read_case, replay, replay_file

CASE = {
    "format": "pyggml-sched-case/1",
    "name": "tiny",
    "buffer_types": [
        {"name": "CPU", "host": True, "alignment": 64},
        {"name": "GPU0", "host": False, "alignment": 128, "alloc_limit": 10_000},
    ],
    "backends": [
        {"name": "GPU0", "device": "GPU", "buft": "GPU0", "bufts": ["GPU0"], "ops": "all", "caps": {"set_async": True}},
        {"name": "CPU", "device": "CPU", "buft": "CPU", "bufts": ["CPU"], "ops": "all", "caps": {}},
    ],
    "tensors": [{"id": "w", "type": "f32", "ne": [8, 4, 3, 1]}],
    "buffers": [{"id": "weights", "buft": "CPU", "usage": "weights", "tensors": ["w"]}],
    "graphs": {
        "g": {
            "tensors": [
                {"id": "x", "type": "f32", "ne": [8, 1, 40, 1], "flags": ["input"]},
                {"id": "ids", "type": "i32", "ne": [2, 40, 1, 1], "flags": ["input"]},
                {"id": "y", "type": "f32", "ne": [4, 2, 40, 1], "op": "MUL_MAT_ID", "src": ["w", "x", "ids"]},
            ],
            "expand": ["y"],
        }
    },
    "sched": {"graph_size": 64, "parallel": False, "op_offload": True},
    "steps": [
        {"op": "build", "graph": "g"},
        {"op": "pin", "graph": "g", "tensor": "y", "backend": 0},
        {"op": "alloc_graph", "graph": "g"},
        {"op": "set_data", "graph": "g", "tensor": "ids", "i32": [0, 2] * 40},
        {"op": "compute", "graph": "g", "async": False},
        {"op": "synchronize"},
    ],
}


@pytest.fixture
def case():
    """A small good case, to be spoilt."""
    return copy.deepcopy(CASE)


@pytest.fixture
def write(tmp_path):
    """Write a case and return its path."""

    def write(case, name="c.case.json"):
        path = tmp_path / name
        text = json.dumps(case).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        return path

    return write


def put(case, way: str, value: object) -> None:
    """Change the value at a dotted way; None removes it."""
    *keys, last = [int(k) if k.isdecimal() else k for k in way.split(".")]
    for key in keys:
        case = case[key]
    if value is None:
        del case[last]
    else:
        case[last] = value


@pytest.mark.parametrize(
    ("way", "value", "where", "what"),
    [
        ("format", "pyggml-sched-case/9", "format", "'pyggml-sched-case/1' expected"),
        ("sched", None, "the file", "'sched' is missing"),
        ("sched.graph_size", "64", "sched.graph_size", 'a whole number expected, not "64"'),
        ("sched.parallel", 1, "sched.parallel", "true or false expected"),
        ("sched.bufts", ["GPU0"], "sched.bufts", "2 buffer types expected"),
        ("buffer_types.0.alignment", 48, "buffer_types[0].alignment", "no power of 2"),
        ("buffer_types.1.name", "CPU", "buffer_types", "'CPU' stands twice"),
        ("buffer_types.0.cpy_from", ["GPU7"], "buffer_types[0].cpy_from[0]", "no buffer type 'GPU7'"),
        ("backends", [], "backends", "no backend"),
        ("backends.0.device", "TPU", "backends[0].device", "no kind of device 'TPU'"),
        ("backends.0.bufts", ["VRAM"], "backends[0].bufts[0]", "no buffer type 'VRAM'"),
        ("backends.0.ops", {"deny": ["MATMUL"]}, "backends[0].ops.deny[0]", "no op 'MATMUL'"),
        ("backends.0.ops", {"min_batch": {"MATMUL": 1}}, "backends[0].ops.min_batch.MATMUL", "no op 'MATMUL'"),
        ("backends.0.fail_compute", {"node": "y", "status": 0}, "backends[0].fail_compute.status", "0 is success"),
        ("backends.0.optimize", {"keep": [["x"]]}, "backends[0].optimize.keep[0]", "two names expected"),
        ("tensors.0.type", "q9_9", "tensors[0].type", "no type 'q9_9'"),
        ("tensors.0.id", 'w"', "tensors[0].id", "is no name"),
        ("tensors.0.id", "w" * 63, "tensors[0].id", "is no name"),
        ("buffers.0.tensors", ["v"], "buffers[0].tensors[0]", "no static tensor 'v'"),
        ("buffers.0.tensors", ["w", "w"], "buffers", "'w' stands twice"),
        ("graphs.g.tensors.0.id", "w", "graphs.g.tensors[0].id", "a tensor 'w' already"),
        ("graphs.g.tensors.0.ne", [8, 1, 40, 1, 1], "graphs.g.tensors[0].ne", "1 to 4 dimensions expected, not 5"),
        ("graphs.g.tensors.0.ne", [-8], "graphs.g.tensors[0].ne[0]", "-8 is out of range"),
        ("graphs.g.tensors.0.type", "q8_0", "graphs.g.tensors[0].ne", "no multiple of the 32 elements"),
        ("graphs.g.tensors.0.nb", [4, 32], "graphs.g.tensors[0].nb", "4 strides expected, not 2"),
        ("graphs.g.tensors.0.flags", ["output", "compute"], "graphs.g.tensors[0].flags[1]", "no flag 'compute'"),
        ("graphs.g.tensors.2.src.1", "z", "graphs.g.tensors[2].src[1]", "no tensor 'z' before this one"),
        ("graphs.g.tensors.2.src", ["x"] * 11, "graphs.g.tensors[2].src", "at most 10 sources"),
        ("graphs.g.tensors.2.op_params", [2**31], "graphs.g.tensors[2].op_params[0]", "out of range"),
        ("graphs.g.expand", ["z"], "graphs.g.expand[0]", "no tensor 'z'"),
        ("steps.0.op", "buidl", "steps[0].op", "no step 'buidl'"),
        ("steps.0", None, "steps[0].graph", "graph 'g' is not built yet"),
        ("steps.0.graph", "h", "steps[0].graph", "no graph 'h'"),
        ("steps.1.backend", 2, "steps[1].backend", "2 is out of range: 0 to 1"),
        ("steps.3.tensor", "z", "steps[3].tensor", "no tensor 'z' in graph 'g'"),
        ("steps.3.i32", None, "steps[3]", "'i32' or 'rows'"),
        ("steps.3.i32", [2**31], "steps[3].i32[0]", "out of range"),
    ],
)
def test_bad_case_says_where_and_what(case, write, way, value, where, what) -> None:
    """A file that is no case is refused with the place in it and what is wrong there."""
    put(case, way, value)
    path = write(case)
    with pytest.raises(FormatError) as caught:
        read_case(path)
    assert str(caught.value).startswith(f"{path}: {where}: ")
    assert what in str(caught.value)


def test_view_of_view_is_refused(case, write) -> None:
    """A view must name its root, and the error says which that is."""
    views = [
        {"id": "v", "type": "f32", "ne": [8], "op": "VIEW", "src": ["x"], "view": {"src": "x", "offs": 0}},
        {"id": "vv", "type": "f32", "ne": [8], "op": "VIEW", "src": ["v"], "view": {"src": "v", "offs": 0}},
    ]
    case["graphs"]["g"]["tensors"] += views
    with pytest.raises(FormatError, match=r"tensors\[4\]\.view\.src: 'v' is a view itself; its root 'x' expected"):
        read_case(write(case))


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"", "not JSON"),
        (b"{]", "not JSON"),
        (b"[]", "an object expected"),
        (b'{"\xff"}', "not UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
        (gzip.compress(b"{}" * 500, mtime=0)[:-9], "damaged gzip"),
    ],
)
def test_damaged_file_is_refused(tmp_path, raw, what) -> None:
    """A file that is no JSON object at all is refused with the reason."""
    path = tmp_path / "c.json"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=what):
        read_case(path)


def test_used_experts_are_copied(case, write) -> None:
    """The calls of a compute hold one copy for each run of used experts, with the padding behind all but the last."""
    trace = replay(read_case(write(case)))
    calls = next(step for step in trace["steps"] if step["op"] == "compute")["calls"]
    expert_bytes = 8 * 4 * 4
    assert [call[3:] for call in calls if call[0] == "set_async" and "#w#" in call[2]] == [
        [0, 2 * expert_bytes, ["weights", 0]],
        [2 * expert_bytes, expert_bytes, ["weights", 2 * expert_bytes]],
    ]


@pytest.mark.parametrize("bad_id", [-1, 3])
def test_bad_id_is_an_error_of_its_step(case, write, bad_id) -> None:
    """Where upstream aborts for an id, the step says what was wrong, and the next steps work."""
    good = case["steps"][3:5]
    case["steps"][3]["i32"] = [bad_id] * 80
    case["steps"] += [{**good[0], "i32": [1] * 80}, good[1]]
    *_, bad, _, _, again = replay(read_case(write(case)))["steps"]
    assert bad["result"] == -1
    assert bad["error"]["type"] == "ExpertIdError"
    assert f"expert id {bad_id}" in bad["error"]["message"]
    assert again["result"] == 0
    assert "error" not in again


def test_out_of_memory_is_a_result(case, write) -> None:
    """An allocation that fails is false, a compute that cannot allocate -2, and a smaller graph works after them."""
    small = json.loads(json.dumps(case["graphs"]["g"]).replace("40", "4"))
    case["graphs"]["g"] = json.loads(json.dumps(case["graphs"]["g"]).replace("40", "400"))
    case["graphs"]["small"] = small
    pin = {"op": "pin", "tensor": "y", "backend": 0}
    case["steps"] = [
        {"op": "build", "graph": "g"},
        {**pin, "graph": "g"},
        {"op": "alloc_graph", "graph": "g"},
        {"op": "reset"},
        {**pin, "graph": "g"},
        {"op": "build", "graph": "small"},
        {"op": "reserve", "graph": "g"},
        {"op": "compute", "graph": "g", "async": True},
        {"op": "compute", "graph": "small", "async": True},
    ]
    case["backends"][1]["ops"] = {"deny": ["MUL_MAT_ID"]}
    steps = replay(read_case(write(case)))["steps"][1:]
    assert [step["result"] for step in steps if "result" in step] == [False, False, -2, 0]
    assert "alloc" not in steps[2]["state"]
    assert "tensor_backend" in steps[6]["state"]


def test_scheduler_that_cannot_be_made_ends_the_trace(case, write) -> None:
    """A case whose last backend is no CPU gives a trace of one step, with the error as its abort."""
    case["backends"].reverse()
    steps = replay(read_case(write(case)))["steps"]
    assert [step["op"] for step in steps] == ["sched_new"]
    assert "must be a CPU" in steps[0]["abort"]["message"]


def test_traces_are_reproducible(case, write, tmp_path) -> None:
    """Two replays of a case write the same bytes, gzip or not."""
    path = write(case, "c.case.json.gz")
    for name in ("a.json", "a.json.gz"):
        traces = [tmp_path / f"{i}{name}" for i in range(2)]
        for trace in traces:
            replay_file(path, trace, dialect=DIALECTS["0.21"])
        assert traces[0].read_bytes() == traces[1].read_bytes()
        assert (traces[0].read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")


def test_command_replays_one_case(case, write, tmp_path) -> None:
    """`replay CASE --trace OUT --dialect` writes the trace and takes full versions of ggml, too."""
    trace = tmp_path / "t.json"
    result = CliRunner().invoke(command, [str(write(case)), "--trace", str(trace), "--dialect", "0.20.2"])
    found = json.loads(trace.read_text())
    assert (result.exit_code, result.output) == (0, f"{len(found['steps'])} steps in dialect 0.20: {trace}\n")
    assert "dialect 0.20" in found["by"]


def test_command_tells_what_became_of_a_folder(case, write, tmp_path) -> None:
    """`replay --all` tells cases, steps and time."""
    write(case, "a.case.json")
    write(case, "b.case.json")
    out = tmp_path / "out"
    result = CliRunner().invoke(command, ["--all", str(tmp_path), "--out", str(out)])
    n_steps = sum(len(json.loads(gzip.decompress(path.read_bytes()))["steps"]) for path in out.iterdir())
    lines = result.output.splitlines()
    assert lines[0] == f"2 of 2 cases replayed in dialect 0.27: {out}"
    assert re.fullmatch(rf"{n_steps} steps in [\d.]+ m?s, 0 with an abort at the end", lines[1])


def test_command_replays_a_folder(case, write, tmp_path) -> None:
    """`replay --all` goes on after a bad file, names it, and ends with status 1."""
    write(case, "a.case.json.gz")
    write({}, "b.case.json")
    out = tmp_path / "out"
    result = CliRunner().invoke(command, ["--all", str(tmp_path), "--out", str(out), "--dialect", "0.26", "--json"])
    assert result.exit_code == 1
    assert "b.case.json: format" in result.stderr or "'format' is missing" in result.stderr
    summary = json.loads(result.stdout)
    assert (summary["n"], summary["dialect"]) == (2, "0.26")
    assert [path.name for path in out.iterdir()] == ["a.trace026.json.gz"]


@pytest.mark.parametrize("arguments", [[], ["--all", "."], ["--dialect", "0.19", "x"]])
def test_command_refuses_what_is_not_whole(arguments) -> None:
    """Without a case and a place for the trace the command ends with status 2."""
    assert CliRunner().invoke(command, arguments).exit_code == 2


def test_no_numba_is_imported() -> None:
    """A replay needs no kernels, so it does not pay for importing Numba."""
    code = "import sys, pyggml.commands.replay; print(*[m for m in ('numba', 'numpy', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "numba" not in done.stdout


def test_a_chunk_of_empty_tensors_is_placed_in_its_compute_buffer() -> None:
    """A batch without tokens over two devices: every tensor is said to be in the compute buffer of its type."""
    empty = {"type": "f32", "ne": [4, 0]}
    case = {
        "format": "pyggml-sched-case/1",
        "name": "empty",
        "buffer_types": [
            {"name": "CPU", "host": True, "alignment": 64},
            {"name": "GPU0", "host": False, "alignment": 64},
        ],
        "backends": [
            {"name": "GPU0", "device": "GPU", "buft": "GPU0", "bufts": ["GPU0"], "ops": "all", "caps": {}},
            {"name": "CPU", "device": "CPU", "buft": "CPU", "bufts": ["CPU"], "ops": "all", "caps": {}},
        ],
        "tensors": [{"id": "norm", "type": "f32", "ne": [4]}],
        "buffers": [{"id": "weights.GPU0", "buft": "GPU0", "usage": "weights", "tensors": ["norm"]}],
        "graphs": {
            g: {
                "tensors": [
                    {"id": "x", **empty, "flags": ["input"]},
                    {"id": "a", **empty, "op": "SQR", "src": ["x"]},
                    *(
                        [{"id": "b", **empty, "op": "ADD", "src": ["a", "norm"], "flags": ["output"]}]
                        if g == "two"
                        else []
                    ),
                ],
                "expand": ["b" if g == "two" else "a"],
            }
            for g in ("one", "two")
        },
        "sched": {"graph_size": 64, "parallel": False, "op_offload": False},
        "steps": [
            {"op": "build", "graph": "one"},
            {"op": "reserve", "graph": "one"},
            {"op": "build", "graph": "two"},
            {"op": "alloc_graph", "graph": "two"},
        ],
    }
    state = replay(parse_case(case), dialect=DIALECTS["0.27"])["steps"][-1]["state"]
    assert {name: place[0] for name, place in state["alloc"].items() if name != "norm"} == {
        "GPU0#x#0": 0, "a": 0, "b": 0, "x": 1,
    }  # fmt: skip
