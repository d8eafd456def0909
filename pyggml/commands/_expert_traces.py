"""What `pyggml experts` reads: files of traces, or models, whose routing is recorded in a run on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import FormatError
from ..files import check_regular
from ._options import choice, count, file_option, json_option, option
from ._page import check_outputs

if TYPE_CHECKING:
    from ..gguf import GGUFFile
    from ..lab import Trace

__all__ = ["TraceFlags", "trace_options"]


#: Texts of different kinds, as requests: prefetchers that learn need others.
PROMPTS = (
    "Why is the sky blue? Explain it to a child.",
    "def quicksort(items: list[int]) -> list[int]:",
    "The year was 1843, and the ship had not seen land for forty days.",
)


@dataclass(frozen=True, slots=True)
class TraceFlags:
    """The options that `compare`, `usage` and `predict` share."""

    traces: tuple[Path, ...]
    form: str
    expert_bytes: str | None
    n_expert: int | None
    phase: str
    prompts: tuple[str, ...]
    n_predict: int
    html: Path | None
    as_json: bool

    def open(self) -> Trace:
        """Return the traces as one.

        Raises
        ------
        FormatError
            A file is none, or they are of different models.
        GraphError
            A model has no experts, or an option does not fit the trace.
        """
        from ..errors import GraphError
        from ..lab import Trace, open_trace
        from ..lab.pools import Capacity

        models = [path for path in self.traces if _is_model(path)]
        if self.prompts and not models:
            raise click.UsageError("--prompt needs a MODEL.gguf: a trace has its own prompt")
        trace = Trace.joined([
            _record(path, self.prompts, self.n_predict) if path in models else open_trace(path, format=self.form)
            for path in self.traces
        ])  # fmt: skip
        if self.n_expert is not None:
            if self.n_expert <= int(trace.ids.max()):
                raise GraphError(f"--n-expert {self.n_expert}: the trace has expert {int(trace.ids.max())}")
            findings = tuple(f for f in trace.findings if f.name != "experts-not-told")
            trace = replace(trace, n_expert=self.n_expert, findings=findings)
        if self.expert_bytes is not None:
            size = Capacity.parse(self.expert_bytes)
            if size.n_bytes is None and size.slots is None:
                raise GraphError(
                    f"--expert-bytes {self.expert_bytes}: not a size", hint="12.6MiB, or a number of bytes"
                )
            trace = trace.with_expert_bytes(size.n_bytes or size.slots or 0)
        return trace


def trace_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `TraceFlags`, and pass them as ``flags``."""

    @functools.wraps(function)
    def with_flags(**values: Any) -> Any:
        flags = TraceFlags(**{field.name: values.pop(field.name) for field in fields(TraceFlags)})
        for path in flags.traces:
            check_outputs(path, flags.html)
        return function(flags=flags, **values)

    for add in reversed(
        (
            click.argument("traces", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="TRACE|MODEL..."),
            option("--format", "form", default="", metavar="NAME",
                 help="Format of the files, if it is not recognised."),
            option("--expert-bytes", metavar="SIZE", help="Size of one expert, if the trace lacks it: 12.6MiB."),
            count("--n-expert", least=1, help="Experts per layer, if the trace lacks it."),
            choice("--phase", values=["decode", "prefill", "all"], shown="decode", help="Steps to count."),
            option("-p", "--prompt", "prompts", multiple=True, metavar="TEXT",
                 help="With a model: a prompt to record; each is a request.  [three texts]"),
            count("-n", "--n-predict", least=2, shown=32, help="With a model: tokens to generate after each prompt."),
            file_option("--html", help="Write a page with plots."),
            json_option("Print JSON."),
        )
    ):  # fmt: skip
        with_flags = add(with_flags)
    return with_flags


def _is_model(path: Path) -> bool:
    """Return whether a file is a GGUF file, by its first bytes; one that cannot be read, by its name."""
    try:
        check_regular(path, most_bytes=None)
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except (OSError, FormatError):
        return path.suffix == ".gguf"


def _record(path: Path, prompts: tuple[str, ...], n_predict: int) -> Trace:
    """Return the routing of a model on the CPU: each prompt and its answer, by the most likely tokens, is a request.

    The answer goes on after an end of text. A model without a vocabulary starts each request from tokens drawn at random.

    Raises
    ------
    GraphError
        The model has no experts, or its context is too short.
    """
    from ..errors import GraphError
    from ..gguf import GGUFFile, require_model
    from ..lab import Phase, Trace
    from ..lab.recording import RoutingRecorder
    from ..lab.validate import validated
    from ..models.architectures import read_hparams
    from ..session import ContextFlags, Session
    from ._kernels import warm_up

    with GGUFFile.open(path) as file:
        require_model(file)
        hparams = read_hparams(file)
        if not hparams.n_expert:
            raise GraphError(f"{path}: the model has no experts", hint="give a mixture-of-experts model, or a trace")
        what, requests = _requests(file, prompts)
        n_ctx = max(map(len, requests.values())) + n_predict
        if n_ctx > hparams.n_ctx_train:
            raise GraphError(
                f"prompt and -n need {n_ctx} tokens, but the model was trained with {hparams.n_ctx_train}",
                hint="use a shorter --prompt, or a smaller -n",
            )
        click.echo(
            f"{path.name}: recording the routing of {what}, each with {n_predict} generated tokens, on the CPU",
            err=True,
        )
        warm_up()
        traces = []
        with Session.open(file, context=ContextFlags(n_ctx=n_ctx)) as session:
            for name, ids in requests.items():
                session.reset()
                recorder = session.watcher = RoutingRecorder(str(path), hparams, file)
                logits = session.decode(ids, outputs="all")[-1]  # all: else the last layer runs for one token only
                recorder.phase = Phase.DECODE
                for _ in session.continue_from(logits, n_predict):
                    pass
                traces.append(replace(recorder.trace(), requests=(name,)))
    return replace(validated(Trace.joined(traces)), source=str(path))


def _requests(file: GGUFFile, prompts: tuple[str, ...]) -> tuple[str, dict[str, list[int]]]:
    """Return what the requests are in words, and the tokens of each by its name."""
    import numpy as np

    from ..tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(file)
    if not prompts and not tokenizer.has_vocabulary:
        rng = np.random.default_rng(0)
        made = {f"tokens {i}": rng.integers(0, tokenizer.n_vocab, 16).tolist() for i in range(len(PROMPTS))}
        return f"{len(made)} prompts of random tokens (the file has no vocabulary)", made
    texts = list(dict.fromkeys(prompts or PROMPTS))
    made = {text: tokenizer.encode(text) for text in texts}
    empty = [text for text, ids in made.items() if not ids]
    if empty:
        raise click.UsageError("--prompt: the text is empty")
    which = "" if prompts else "default "
    return f"{len(texts)} {which}prompt{'s' if len(texts) > 1 else ''}", made
