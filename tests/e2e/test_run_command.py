"""`pyggml run` as other programs call it: files, JSON, exit statuses, and text that streams."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from edited_models import write_edited

from pyggml import GGUFFile, Type, cli
from pyggml.makers.make_moe import Recipe, Sizes, make_moe

TOKENS = "32,85,138,191,244,41,94,147,200,253"


@pytest.fixture(scope="session")
def moe(tmp_path_factory) -> str:
    """Give a tiny mixture of experts with a vocabulary of bytes."""
    path = tmp_path_factory.mktemp("run") / "moe.gguf"
    make_moe(path, Recipe("llama", Type.Q8_0, seed=3, sizes=Sizes(layers=2, experts=8, used=2, ctx=256)))
    return str(path)


@pytest.fixture(autouse=True)
def _offload_all(monkeypatch):
    """Let the device take every batch, so that small prompts copy experts."""
    monkeypatch.setenv("GGML_OP_OFFLOAD_MIN_BATCH", "1")


def run_json(capsys, *words: str) -> dict:
    """Run and return the report."""
    assert cli.run(["run", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_report_adds_up(moe, capsys):
    """Bytes by layer are those in all; splits are those of each batch size; tokens are what was asked for."""
    report = run_json(capsys, moe, "--tokens", TOKENS, "-n", "4", "--cpu-moe", "--ignore-eos")
    assert report["complete"]
    assert report["prompt_tokens"] == [int(t) for t in TOKENS.split(",")]
    assert len(report["tokens"]) == 4
    assert [b["n_tokens"] for b in report["batches"]] == [10, 1]
    total = report["experts"]["total"]
    for key in ("bytes_copied", "bytes_full"):
        assert sum(layer[key] for layer in report["layers"]) == total[key] > 0
        assert report["experts"]["prompt"][key] + report["experts"]["generate"][key] == total[key]
    assert total["bytes_copied"] < total["bytes_full"]
    by_reason = report["bytes_by_device"]["SIM0"]
    assert by_reason["experts"] == total["bytes_copied"]
    assert sum(b["bytes_copied"] for b in report["batches"]) == sum(
        n for device in report["bytes_by_device"].values() for n in device.values()
    )
    assert {m["buft"] for m in report["memory"]} == {"SIM0", "SIM0_Host", "CPU"}


def test_copies_do_not_change_what_is_said(moe, capsys):
    """The same tokens come out with used experts, whole copies, upstream's policy and on the CPU alone."""
    common = (moe, "--tokens", TOKENS, "-n", "6", "--ignore-eos")
    told = [run_json(capsys, *common, "--device", "cpu")["tokens"]]
    for kind in ("used", "upstream", "full"):
        told.append(run_json(capsys, *common, "--cpu-moe", "--expert-copy", kind)["tokens"])
    assert told == [told[0]] * 4


def test_logits_and_experts_are_dumped(moe, tmp_path, capsys):
    """The file holds logits and chosen experts of every prompt token; the run goes on as without it."""
    out = tmp_path / "logits.npz"
    words = (moe, "--tokens", TOKENS, "-n", "3", "--cpu-moe", "--ignore-eos")
    plain = run_json(capsys, *words)
    dumped = run_json(capsys, *words, "--dump-logits", str(out))
    assert dumped["tokens"] == plain["tokens"]
    with np.load(out) as file:
        assert (file["logits"].dtype, file["logits"].shape) == (np.float32, (10, 320))
        assert (file["topk"].dtype, file["topk"].shape) == (np.int32, (2, 10, 2))
        assert file["logits"][-1].argmax() == plain["tokens"][0]
        assert ((file["topk"] >= 0) & (file["topk"] < 8)).all()


def test_timeline_can_be_opened(moe, tmp_path, capsys):
    """The file is trace events: lanes have names, copies their bytes, and all of them add up to the report's."""
    out = tmp_path / "timeline.json"
    report = run_json(capsys, moe, "--tokens", TOKENS, "--cpu-moe", "--timeline", str(out))
    events = json.loads(out.read_text())["traceEvents"]
    lanes = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    spans = [e for e in events if e["ph"] == "X"]
    assert {(e["pid"], e["tid"]) for e in spans} <= lanes
    copies = [e for e in spans if e["cat"] == "copy" and e["pid"] == 1]
    assert sum(e["args"]["bytes"] for e in copies) == sum(b["bytes_copied"] for b in report["batches"])


def test_text_streams_and_report_follows(moe, capsys):
    """Without --json the text comes first, then the tables; --quiet leaves only the text."""
    words = ["run", moe, "--prompt", "abc", "-n", "3", "--cpu-moe", "--ignore-eos"]
    assert cli.run(words) == 0
    full = capsys.readouterr().out
    assert cli.run([*words, "--quiet"]) == 0
    text = capsys.readouterr().out
    assert full.startswith(text.rstrip("\n"))
    assert "Splits by micro-batch size" in full
    assert "Splits" not in text


def test_sampling_is_seeded(moe, capsys):
    """The same seed says the same, another seed something else."""
    words = (moe, "--prompt", "abc", "-n", "8", "--temp", "1.5", "--top-k", "0", "--ignore-eos", "--device", "cpu")
    first, again, other = (run_json(capsys, *words, "--seed", s)["tokens"] for s in ("1", "1", "2"))
    assert first == again != other


@pytest.fixture
def converse(moe, monkeypatch):
    """Run a conversation with a simple chat template; return each turn's message and reused tokens."""
    from pyggml.commands import _conversation
    from pyggml.tokenizer import Tokenizer

    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    monkeypatch.setattr(Tokenizer, "apply_chat_template", lambda self, messages, **_: _render(template, messages))
    seen: list[tuple[str, int]] = []
    turn = _conversation.Conversation.turn

    def spy(self, text, n_predict, emit):
        answer = turn(self, text, n_predict, emit)
        seen.append((text, self.n_reused))
        return answer

    monkeypatch.setattr(_conversation.Conversation, "turn", spy)

    def run(lines: str, *words: str) -> list[tuple[str, int]]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        assert cli.run(["run", moe, "-i", "-n", "2", "--device", "cpu", "-c", "256", "--quiet", *words]) == 0
        return seen

    return run


def test_interactive_keeps_the_cache_between_turns(converse, capsys):
    """Each line of the input is a turn; the common beginning of two turns is not evaluated again."""
    (_, first), (_, second) = converse("one\ntwo\n")
    assert first == 0
    assert second >= len("<user>one<assistant>")
    capsys.readouterr()


def test_slash_words_of_a_conversation(converse, tmp_path, capsys):
    """/clear and /regen change the messages, /read sends a file, two slashes send one, /exit ends."""
    note = tmp_path / "note.txt"
    note.write_text("from a file")
    turns = converse(f"one\n/regen\n/clear\n/read {note}\n//etc\n/exit\nnot read\n", "--system", "short")
    assert [text for text, _ in turns] == ["one", "one", "from a file", "/etc"]
    same, kept = turns[1][1], turns[2][1]
    assert same >= len("<system>short<user>one<assistant>") - 1
    assert len("<system>short<user>") <= kept < same
    assert capsys.readouterr().err.strip() == ""


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/help", "//TEXT"),
        ("/hlep", "did you mean /help? /help lists commands, //hlep sends the line"),
        ("/home/me is a folder", "there is no command /home/me (/help lists commands, //home/me is a folder sends"),
        ("/read", "/read needs an argument: /read FILE"),
        ("/read no-such-file", "/read no-such-file: no such file"),
        ("/regen", "there is no answer to generate again"),
    ],
    ids=lambda text: text.split()[0],
)
def test_a_slash_word_that_is_not_a_message_goes_on(converse, line, says, capsys):
    """The user sees what can be typed, nothing is sent, and the conversation goes on."""
    assert [text for text, _ in converse(f"{line}\nhello\n")] == ["hello"]
    assert says in " ".join(capsys.readouterr().err.split())


def _render(template: str, messages: list[dict[str, str]]) -> str:
    from jinja2 import Template

    return Template(template).render(messages=messages)


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["MODEL", "--tokens", "1,2,320"], 1, "320"),
        (["MODEL", "--tokens", "1,x"], 2, "--tokens"),
        (["MODEL", "--tokens", "1", "--prompt", "a"], 2, "not both"),
        (["MODEL", "--prompt", "abc", "-c", "2"], 1, "-c"),
        (["MODEL", "--prompt", "abc", "-n", "300"], 1, "256"),
        (["MODEL", "--prompt", "abc", "-ot", "blk"], 1, "-ot"),
        (["MODEL", "--prompt", "abc", "-ot", "(=CPU"], 1, "-ot"),
        (["MODEL", "--prompt", "abc", "-ot", "x=NOPE"], 1, "NOPE"),
        (["MODEL", "--prompt", "abc", "--device", "tpu:0,cpu"], 1, "tpu"),
        (["MODEL", "--prompt", "abc", "--device", "sim:none,cpu"], 1, "none"),
        (["MODEL", "--prompt", "abc", "--device", "sim:custom:1MiB,1GB/s,1GB/s,cpu"], 1, "memory"),
        (["MODEL", "--prompt", "abc", "-ctk", "q9"], 2, "q9"),
        (["MODEL", "--prompt", "abc", "--timeline", "/no/such/folder/t.json"], 2, "folder"),
        (["nothing.gguf", "--prompt", "abc"], 1, "nothing.gguf"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else str(value),
)
def test_bad_input_is_one_clear_line(words, status, says, moe, capsys):
    """What, where and what to try; no traceback, and the right exit status."""
    assert cli.run(["run", *(moe if w == "MODEL" else w for w in words)]) == status
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
    if status == 1:
        assert len(err.strip().splitlines()) == 1


def test_damaged_model_is_one_clear_line(moe, tmp_path, capsys):
    """A truncated file and an architecture that is not known are named."""
    raw = Path(moe).read_bytes()
    for name, data, says in (("short", raw[: len(raw) // 2], "short"), ("junk", b"nonsense" * 99, "GGUF")):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        assert cli.run(["run", str(path), "--prompt", "a"]) == 1
        err = capsys.readouterr().err
        assert says in err
        assert len(err.strip().splitlines()) == 1
    other = tmp_path / "other.gguf"
    other.write_bytes(raw.replace(b"llama", b"mamba"))
    assert cli.run(["run", str(other), "--prompt", "a"]) == 1
    assert "'mamba' is not supported" in capsys.readouterr().err


@pytest.mark.parametrize("draw", [(), ("--temp", "0.8", "--seed", "1")], ids=["greedy", "drawn"])
@pytest.mark.parametrize("device", [("--device", "cpu"), ("--cpu-moe",)], ids=["cpu", "device"])
@pytest.mark.parametrize("weight", ["output_norm.weight", "blk.0.attn_q.weight"])
def test_a_weight_that_is_no_number_is_named(weight, device, draw, moe, tmp_path, capsys):
    """NaN in a weight of floats or of blocks ends the run with the node and the weight, however tokens are chosen."""
    raw = bytearray(Path(moe).read_bytes())
    with GGUFFile.open(moe) as file:
        found = file.tensors[weight]
        assert found.type in (Type.F32, Type.Q8_0)
    nan = np.full(1, np.nan, "f4" if found.type is Type.F32 else "f2").tobytes()
    raw[found.offset : found.offset + len(nan)] = nan
    path = tmp_path / "nan.gguf"
    path.write_bytes(raw)
    assert cli.run(["run", str(path), "--tokens", TOKENS, "-n", "3", "--ignore-eos", *device, *draw]) == 1
    err = capsys.readouterr().err
    assert f"its weight '{weight}' contains NaN" in err
    assert len(err.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def templated(tmp_path_factory) -> dict[str, str]:
    """Give a tiny model with a chat template, and one that adds no BOS."""
    folder = tmp_path_factory.mktemp("templated")
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    keys = {
        "CHAT": {"tokenizer.chat_template": template},
        "NOBOS": {"tokenizer.ggml.add_bos_token": False},
    }
    return {name: str(write_edited(folder / f"{name}.gguf", "llama", full_keys=k)) for name, k in keys.items()}


@pytest.mark.parametrize("n", ["0", "2"])
@pytest.mark.parametrize(
    ("model", "words", "n_prompt"),
    [
        ("CHAT", [], 1), ("CHAT", ["-p", ""], 1), ("NOBOS", ["-p", ""], 1), ("CHAT", ["-p", " "], None),
        ("CHAT", ["--chat", "-p", ""], 2),
    ],
)  # fmt: skip
def test_an_empty_prompt_is_answered(model, words, n_prompt, n, templated, capsys):
    """Of nothing the model goes on from BOS, in a chat from the template's text; -n is kept to."""
    report = run_json(capsys, templated[model], *words, "-n", n, "--ignore-eos", "--device", "none")
    assert len(report["prompt_tokens"]) == n_prompt or (n_prompt is None and len(report["prompt_tokens"]) > 1)
    assert len(report["tokens"]) == int(n)


@pytest.mark.parametrize("n", ["0", "2"])
@pytest.mark.parametrize("tokens", ["", ",", " "])
def test_no_tokens_are_refused(tokens, n, templated, capsys):
    """An empty list of ids is one clear line, whatever -n."""
    assert cli.run(["run", templated["CHAT"], "--tokens", tokens, "-n", n, "--json", "--device", "none"]) == 1
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.strip() == "Error: a batch without tokens cannot be decoded"


def test_a_turn_longer_than_the_context_is_told(templated):
    """The process of a conversation answers what fits, then says how many tokens do not, and where; no traceback."""
    words = ["run", templated["CHAT"], "-i", "-c", "256", "-n", "4", "--temp", "0", "--device", "none", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "pyggml", *words], input="hi\n" + "hello " * 600 + "\nhi again\n",
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.strip()
    (line,) = done.stderr.strip().splitlines()
    assert "tokens do not fit into the KV cache" in line
    assert "of 256 cells are in use (make the context larger (-c)" in line
