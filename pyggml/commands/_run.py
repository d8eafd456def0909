"""What `run` does once its options are read: devices and model opened, prompt and answer, results written, report."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from ..errors import GraphError, PyggmlError, visible
from ..gguf import GGUFFile, require_model
from ..lab import Phase
from ..lab.formats import jsonl, moe_cache_eval
from ..lab.recording import RoutingRecorder
from ..models.architectures import read_hparams
from ..models.hparams import HParams
from ..planning import virtual_clock
from ..record import Recording
from ..report import CopyAccount
from ..sampling import make_sampler
from ..session import Session, TopK
from ..tokenizer import StreamDecoder, Tokenizer
from ._console import print_json, progress, report, warn
from ._conversation import Conversation
from ._kernels import warm_up
from ._model_options import ModelFlags, open_backends
from ._page import about_devices, about_model, aside, given_options, write_records
from ._run_report import RunReport
from ._virtual import VirtualReport

if TYPE_CHECKING:
    import numpy.typing as npt

    from ..record import Record, Recorder
    from ..sampling import SamplerFlags

__all__ = ["Output", "converse", "evaluate"]


@dataclass(frozen=True, slots=True)
class Output:
    """Where results go."""

    as_json: bool
    timeline: Path | None
    html: Path | None
    logits: Path | None
    routing: Path | None
    is_quiet: bool


@dataclass(slots=True)
class _Run:
    """A session, and what is told of it."""

    session: Session
    tokenizer: Tokenizer
    output: Output
    report: RunReport
    recording: Recording | None
    routing: RoutingRecorder | None = None

    def finish(self) -> None:
        """Write what was recorded and print the report, complete or not."""
        if not self.report.is_complete and not self.report.shapes:
            return  # nothing happened that is worth a report
        try:
            self._write()
        finally:
            self._print()

    def _write(self) -> None:
        if self.recording is not None:
            about = {
                "model": self.report.model,
                "devices": self.report.devices,
                "options": given_options(),
                "assumed": "" if self.report.virtual is None else self.report.virtual.assumed(),
            }
            write_records(
                self.recording.records,
                about,
                timeline=self.output.timeline,
                html=self.output.html,
                name=Path(self.report.model["path"]).stem,
            )
        if self.routing is not None and self.output.routing is not None:
            write = moe_cache_eval.write if self.output.routing.suffix == ".npz" else jsonl.write
            with aside(self.output.routing) as part:
                write(self.routing.trace(), part)

    def _print(self) -> None:
        if self.output.as_json:
            print_json(self.report.as_dict())
            return
        if self.report.text:
            click.echo()
        if not self.output.is_quiet:
            if self.report.text:
                click.echo()
            self.report.print(report())

    def emit(self, text: str) -> None:
        """Take a piece of the answer."""
        self.report.text += text
        if not self.output.as_json and text:
            echo_piece(text)


def evaluate(
    flags: ModelFlags,
    model: Path,
    output: Output,
    prompt: str | None,
    n_predict: int,
    sampler: SamplerFlags,
    *,
    ids: list[int] | None,
    chat: bool,
    system: str,
    ignore_eos: bool,
) -> None:
    """Evaluate a prompt, or the ids given instead, generate, and report however it ends."""
    start_s = time.perf_counter()
    with GGUFFile.open(model) as file:
        require_model(file)
        tokenizer = Tokenizer.from_gguf(file)
        if ids is None:
            ids = _encode(tokenizer, prompt, chat=chat, system=system)
        with _open(flags, file, tokenizer, output, start_s, n_tokens=len(ids) + n_predict) as run:
            run.report.prompt_tokens = ids
            with run.report.timed("prompt"):
                logits = _evaluate_prompt(run, ids)
            run.report.n_prompt = len(ids)
            if n_predict:
                _generate(run, logits, n_predict, sampler, ignore_eos=ignore_eos)


def converse(
    flags: ModelFlags,
    model: Path,
    output: Output,
    prompt: str | None,
    n_predict: int,
    sampler: SamplerFlags,
    *,
    system: str,
) -> None:
    """Take turns until the input ends, then report."""
    start_s = time.perf_counter()
    with GGUFFile.open(model) as file:
        require_model(file)
        tokenizer = Tokenizer.from_gguf(file)
        with _open(flags, file, tokenizer, output, start_s, n_tokens=None) as run:
            talk = Conversation(run.session, tokenizer, make_sampler(sampler))
            if system:
                talk.messages.append({"role": "system", "content": system})
            for text in _lines(prompt):
                with run.report.timed("turns"):
                    talk.turn(text, n_predict, echo_piece)
                click.echo()


def echo_piece(text: str) -> None:
    """Print a piece of a model's text as it is; on a terminal, control characters are made visible."""
    click.echo(visible(text) if sys.stdout.isatty() else text, nl=False)


@contextmanager
def _open(
    flags: ModelFlags, file: GGUFFile, tokenizer: Tokenizer, output: Output, start_s: float, *, n_tokens: int | None
) -> Iterator[_Run]:
    """Open devices and the model for the block; when it ends, write and report.

    Parameters
    ----------
    start_s : float
        When the command began, of ``time.perf_counter``.
    n_tokens : int or None
        Tokens that the context must hold; None for a conversation.
    """
    hparams = read_hparams(file)
    if n_tokens is not None:
        _check_room(flags, hparams, n_tokens)
    backends, cpu = open_backends(flags)
    kernels_s = time.perf_counter()
    warm_up()
    load_s = time.perf_counter()
    account = CopyAccount()
    recording = Recording() if output.timeline or output.html else None
    clock = virtual_clock([*backends, cpu])
    profile = backends[0].device.profile if backends else None
    told = RunReport(
        model=about_model(file, hparams),
        devices=about_devices([*backends, cpu], clock),
        account=account,
        link=None if profile is None else profile.link,
        virtual=None if clock is None else VirtualReport(clock, [b.name for b in (*backends, cpu)]),
    )
    with progress() as bar:
        task = bar.add_task(f"loading {Path(file.path).name} (MB)", total=None)
        session = Session.open(
            file,
            devices=backends,
            cpu=cpu,
            placement=flags.placement(),
            context=flags.context(n_ctx=None if n_tokens is None else min(max(n_tokens, 1), hparams.n_ctx_train)),
            policy=flags.policy(),
            recorder=_Tee(account, recording),
            clock=clock,
            progress=lambda done, total: bar.update(task, completed=done // 10**6, total=-(-total // 10**6)),
        )
    with session:
        told.seconds["kernels"] = load_s - kernels_s
        told.seconds["load"] = time.perf_counter() - load_s
        told.watch(session)
        routing = None if output.routing is None else RoutingRecorder(str(output.routing), hparams, file)
        run = _Run(session, tokenizer, output, told, recording, routing)
        try:
            yield run
            told.is_complete = True
        except KeyboardInterrupt:
            told.stopped = "interrupted"
            raise
        except PyggmlError as error:
            told.stopped = str(error)
            raise
        finally:
            told.seconds["total"] = time.perf_counter() - start_s
            run.finish()


def _check_room(flags: ModelFlags, hparams: HParams, n_tokens: int) -> None:
    """Refuse a context that is too small before anything is loaded; warn of one that the model never saw."""
    if flags.n_ctx and n_tokens > flags.n_ctx:
        raise GraphError(
            f"the prompt and -n need {n_tokens} tokens, -c gives {flags.n_ctx}",
            hint=f"use -c {n_tokens} or more, or a shorter prompt",
        )
    if n_tokens > hparams.n_ctx_train:
        if not flags.n_ctx:
            raise GraphError(
                f"the prompt and -n need {n_tokens} tokens, the model was trained with {hparams.n_ctx_train}",
                hint="use a shorter prompt, or -c to go beyond",
            )
        warn(f"the context is longer than the {hparams.n_ctx_train} tokens that the model was trained with")


def _evaluate_prompt(run: _Run, ids: list[int]) -> npt.NDArray[np.float32]:
    """Evaluate the prompt; write all its logits, or what experts it used, if that was asked for."""
    last: npt.NDArray[np.float32]
    if run.output.logits is None and run.output.routing is None:
        last = run.session.decode(ids, outputs="last")[-1]
        return last
    topk = None if run.output.logits is None else TopK()
    if run.routing is not None:
        run.session.watcher = run.routing
    logits = run.session.decode(ids, outputs="all", topk=topk)
    if run.output.logits is not None and topk is not None:
        _save(run.output.logits, logits=logits, topk=topk.ids)
    last = logits[-1]
    return last


def _save(path: Path, **arrays: npt.NDArray[np.generic]) -> None:
    """Write arrays to a file of exactly that name, or of that name with `.npz`, as numpy names them."""
    with (
        aside(path if path.suffix == ".npz" or path.exists() else path.with_name(f"{path.name}.npz")) as part,
        part.open("wb") as file,
    ):
        savez: Callable[..., None] = np.savez  # typed as if an array could be its allow_pickle
        savez(file, **arrays)


def _generate(
    run: _Run, logits: npt.NDArray[np.float32], n_predict: int, flags: SamplerFlags, *, ignore_eos: bool
) -> None:
    """Draw tokens until there are ``n_predict`` or the text ends."""
    told = run.report
    told.account.phase = "generate"
    if run.routing is not None:
        run.routing.phase = Phase.DECODE
    stop = frozenset() if ignore_eos else frozenset(run.tokenizer.eog_ids)
    decoder = StreamDecoder(run.tokenizer)
    with told.timed("generate"):
        for id in run.session.continue_from(logits, n_predict, make_sampler(flags), stop=stop):
            told.tokens.append(id)
            told.n_generated += 1
            run.emit(decoder.feed(id))
    run.emit(decoder.flush())
    if told.n_generated < n_predict:
        told.stopped = "end of text"


def _encode(tokenizer: Tokenizer, prompt: str | None, *, chat: bool, system: str) -> list[int]:
    if not tokenizer.has_vocabulary:
        return [0] if prompt is None else tokenizer.encode(prompt)
    if chat:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt or ""})
        return tokenizer.encode_chat(messages)
    ids = tokenizer.encode(prompt or "")
    if not ids:
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        ids = [0 if start is None else start]
    return ids


def _lines(first: str | None) -> Iterator[str]:
    """Yield what the user says: the prompt, then lines until the input ends."""
    if first is not None:
        yield first
    while True:
        try:
            line = (
                click.prompt(">", prompt_suffix=" ", err=True) if sys.stdin.isatty() else next(sys.stdin).rstrip("\n")
            )
        except (EOFError, StopIteration, click.Abort):
            return
        if line.strip():
            yield line


class _Tee:
    """Gives each record to several recorders."""

    def __init__(self, first: Recorder, second: Recording | None) -> None:
        self.recorders: list[Recorder] = [first] if second is None else [first, second]

    def record(self, record: Record) -> None:
        """Give a record to each."""
        for recorder in self.recorders:
            recorder.record(record)
