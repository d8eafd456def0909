"""Attacks on the program: hostile names in files, paths and options, and outputs that cannot be written."""

from __future__ import annotations

import contextlib
import gzip
import html.parser
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from pyggml import cli
from pyggml.gguf import GGUFFile
from pyggml.gguf.header import ValueType
from pyggml.makers.gguf_writer import GGUFWriter
from pyggml.makers.make_moe import Recipe, Sizes, make_moe
from pyggml.types import Type

TINY = Sizes(layers=2, embd=64, heads=4, kv_heads=2, head_dim=16, ff=96, ff_exp=32, experts=8, used=3)
#: What `cli.run` may return: done, an error, a wrong command line, what does not fit.
STATUS = {0, 1, 2, 3}
NAMES = (
    "\x1b]0;PWNED\x07", "\x1b[2J\x1b[31m", "\x9b31m", "\r\b\x00\x7f", "\u202eabc\u2066", "</script><img src=x onerror=alert(1)>",
    "<!--", "-->", "]]>", "'\"><svg/onload=alert(1)>", "&lt;script&gt;", "[red]", "[/]", "[/nothing]", "[link=file:///etc]x[/link]", "{{ 7 * 7 }}", "%s%n",
    "${HOME}", "`id`", "a\nb", "\t", "", " ", "..", "/", "\\", "=CPU", ",", "\ud800", "\U0001f926\u200d\u2642\ufe0f", "日本", "e\u0301" * 40, "x" * 5000, "__proto__", "constructor",
)  # fmt: skip
#: Sequences that colour text and redraw a progress bar, which are the program's own.
OWN = re.compile(r"\x1b\[[0-9;]*m|\r?(\x1b\[(2K|1A))+|\x1b\[\?25[lh]")


def hostile(rng: random.Random) -> str:
    """Return a name that means something to a terminal, a page, a table's markup or a shell."""
    return "".join(rng.choice(NAMES) for _ in range(rng.choice((1, 1, 2, 3))))


class _Terminal(io.StringIO):
    """What a terminal would be sent."""

    def isatty(self) -> bool:
        return True


def _run(words: list[str]) -> tuple[int, str, str]:
    """Run the program as on a terminal; return its exit status, all that it printed, and its standard output alone."""
    out, err = _Terminal(), _Terminal()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.run(words)
    text = out.getvalue() + err.getvalue()
    assert status in STATUS, f"exit status {status}: {text[-400:]}"
    assert "error in pyggml" not in text, text[-600:]
    return status, text, out.getvalue()


class _Tags(html.parser.HTMLParser):
    """Which elements a page has, with the names of their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[f"{tag} {sorted(name for name, _ in attrs)}"] += 1


def _tags(path: Path) -> set[str]:
    parser = _Tags()
    parser.feed(path.read_text(encoding="utf-8"))
    return set(parser.found)


def _plain(folder: Path) -> Path:
    path = folder / "plain.gguf"
    if not path.exists():
        make_moe(path, Recipe("qwen3moe", Type.F32, seed=11, sizes=TINY))
    return path


def _renamed(plain: Path, path: Path, where: str, name: str) -> None:
    """Write a model with a hostile name in one place."""
    raw = name.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    writer = GGUFWriter()
    with GGUFFile.open(plain) as file:
        for key in file.metadata:
            entry = file.metadata.entry(key)
            if key != where:
                writer.add_raw(key, entry.type, entry.length, file.metadata.raw(key))
        if where.startswith("general."):
            writer.add(where, ValueType.STRING, raw)
        elif where == "key":
            writer.add(raw or "empty", ValueType.STRING, raw)
        elif where == "tokenizer.ggml.tokens":
            n = file.metadata.entry(where).length
            writer.add_array(where, ValueType.STRING, [f"{raw}{i}" for i in range(n)])
        elif where == "tokenizer.chat_template":
            writer.add(where, ValueType.STRING, raw)
        for info in file.tensors.values():
            n = max(i + 1 for i in range(4) if i == 0 or info.ne[i] != 1)
            data = file.data(info.name).copy()
            writer.add_tensor(info.name, info.type, info.ne[:n], partial(lambda r: [r.tobytes()], data))
        if where == "tensor":
            writer.add_tensor(raw[:60] or "empty", Type.F32, (32,), lambda: [np.ones(32, np.float32).tobytes()])
        writer.write(path)


PLACES = ("general.name", "general.architecture", "general.type", "key", "tensor", "tokenizer.ggml.tokens",
          "tokenizer.chat_template", "path", "-ot", "-dev", "--host", "--timeline", "trace", "case", "model name", "prompt")  # fmt: skip


def names(seed: int, folder: Path) -> str:
    """Put a hostile name somewhere, run a command over it, and look at the terminal, the JSON and the page."""
    rng = random.Random(seed)
    name, where = hostile(rng), rng.choice(PLACES)
    plain, page, model = _plain(folder), folder / "page.html", folder / "named.gguf"
    reference = folder / "plain.html"
    if not reference.exists():
        assert _run(["splits", str(plain), "--cpu-moe", "--html", str(reference)])[0] == 0
    page.unlink(missing_ok=True)
    words: list[str] = []
    command = rng.choice(("splits", "splits", "run", "savings"))
    if where == "path":
        model = folder / (
            re.sub(r"[/\x00]", "", name).encode("utf-8", "surrogatepass")[:200].decode("utf-8", "ignore") + ".gguf"
        )
        shutil.copy(plain, model)
    elif where.startswith("-") and where != "--timeline":
        model, words = plain, [where, name + rng.choice(("", "=CPU", "=SIM0", ",cores=8"))]
    elif where == "prompt":
        model, command, words = plain, "run", ["-p", name]
    elif where not in ("--timeline", "trace", "case", "model name"):
        _renamed(plain, model, where, name)
    json_asked = rng.random() < 0.3
    if where == "--timeline":
        file = folder / "a.json"
        records = [
            {"name": name, "ph": "X", "ts": 0, "dur": 1, "pid": 1, "tid": 1, "cat": name, "args": {"name": name}}
        ]
        file.write_text(json.dumps({"traceEvents": records, "pyggml": rng.choice(([], {}, name, {name: name}))}))
        argv, json_asked = ["viz", str(file), "-o", str(page)], False
    elif where == "trace":
        file = folder / rng.choice(("t.jsonl", "t.csv", "t.json", "t.json.gz", "t.npz"))
        text = "\n".join(json.dumps({"request": name, "layer": 0, "step": i, "ids": [[i, i + 1]]}) for i in range(3))
        file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
        argv, json_asked = ["experts", "compare", str(file)], False
    elif where == "case":
        file = folder / "c.case.json"
        file.write_text(
            json.dumps({"backends": [{"name": name}], "graph": {"nodes": [{"name": name, "op": name}]}, "name": name})
        )
        argv, json_asked = ["replay", str(file)], False
    elif where == "model name":
        argv = [rng.choice(("splits", "plan", "savings")), name, *(["--json"] if json_asked else [])]
    else:
        argv = [command, str(model), *words, *(["-ngl", "99", "--cpu-moe"] if rng.random() < 0.5 else [])]
        argv += ["-n", "1"] if command == "run" else []
        argv += ["--tokens", "5,6,7"] if command == "run" and where != "prompt" else []
        argv += ["--json"] if json_asked else ["--html", str(page)] if command != "savings" else []
    if any("\x00" in word for word in argv):
        argv = [word.replace("\x00", "") for word in argv]
    status, text, out = _run(argv)
    if json_asked and status in (0, 3):
        assert isinstance(json.loads(out), (dict, list))
    seen = OWN.sub("", text)
    wrong = sorted({c for c in seen if not c.isprintable() and c not in "\n\t"})
    assert not wrong, f"{where}: {wrong} reach the terminal of {argv[0]}"
    if page.exists() and where != "--timeline":
        more = _tags(page) - _tags(reference)
        assert not any(re.search("onerror|onload|svg|img|iframe", tag) for tag in more), (where, more)
    return "refused" if status else "ran"


def outputs(seed: int, folder: Path) -> str:
    """Write an output where it cannot be written, or not whole; what was there stays, and nothing half is left."""
    rng = random.Random(seed)
    plain = _plain(folder)
    place = folder / f"out{seed}"
    place.mkdir()
    run = ["run", str(plain), "--tokens", "5,6,7", "-n", "1", "--ignore-eos"]
    argv = rng.choice(
        (
            [*run, "--html"], [*run, "--timeline"], [*run, "--dump-logits"], [*run, "--record-routing"],
            ["splits", str(plain), "--html"], ["splits", str(plain), "--timeline"], ["plan", "llama-3.2-1b", "--html"],
            ["make-moe", "--preset", "fine-grained"], ["devices", "--measure"], ["selftest", "--device", "cpu", "--stages", "copies", "-o"],
        )
    )  # fmt: skip
    how = rng.choice(("file too large", "a folder", "no folder", "a loop", "too long", "/dev/full", "/proc"))
    older, name = None, "out.npz" if argv[-1] == "--dump-logits" else "out"
    target = place / name
    if how == "file too large":
        older = b"older"
        target.write_bytes(older)
    elif how == "a folder":
        target.mkdir()
    elif how == "no folder":
        target = place / "none" / name
    elif how == "a loop":
        target.symlink_to(target)
    elif how == "too long":
        target = place / ("x" * 300 + name)
    elif how == "/dev/full":
        target = place / "full"
        try:  # one of its own: a program that replaces what it should write to harms no other
            os.mknod(target, 0o600 | stat.S_IFCHR, os.makedev(1, 7))
        except OSError:
            return "skipped: no right to make a device"
    else:
        target = Path("/proc/1/nothing")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if how == "file too large":
        resource.setrlimit(resource.RLIMIT_FSIZE, (rng.choice((0, 100, 4096)), limit[1]))
    try:
        status, text, _ = _run([*argv, str(target)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    left = {p.name for p in place.iterdir()}
    shape = " ".join(argv[:1] + argv[-1:])
    if status == 0:  # so small an output that the limit does not meet it
        assert how == "file too large", (shape, how)
        return "ran"
    assert how not in ("no folder", "a folder", "too long") or target.name[:40] in text.replace("\n", ""), (
        shape,
        how,
        text,
    )
    if older is not None:
        assert target.read_bytes() == older, (shape, how)
    assert left <= {name, "full"}, (shape, how, left)
    assert "full" not in left or (place / "full").is_char_device(), (shape, how)
    shutil.rmtree(place)
    return f"refused: {status}"
