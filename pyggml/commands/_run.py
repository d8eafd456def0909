"""The work of `pyggml run`: open devices and model, evaluate, generate, write results, report."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
import numpy as np

from ..errors import GraphError, PyggmlError, visible
from ..files import aside
from ..gguf import GGUFFile, require_model
from ..lab import Phase
from ..lab.formats import jsonl, moe_cache_eval
from ..lab.recording import RoutingRecorder
from ..models.architectures import read_hparams
from ..models.loading import Progress
from ..models.source import ModelFacts
from ..planning import virtual_clock
from ..record import Recording
from ..report import CopyAccount
from ..routing import routing_of
from ..sampling import make_sampler
from ..session import Session, TopK
from ..tokenizer import StreamDecoder, Tokenizer
from ._console import print_json, progress, report, warn
from ._conversation import Conversation, LineError, help_text, parse_line
from ._kernels import warm_up
from ._model_options import ModelFlags, device_names, open_backends
from ._page import about_devices, about_model, given_options, write_records
from ._run_report import RunReport
from ._virtual import VirtualReport

if TYPE_CHECKING:
    import numpy.typing as npt

    from ..backend import Backend
    from ..llama import LlamaModel
    from ..moe_cache import CacheRule
    from ..record import Record, Recorder
    from ..sampling import SamplerFlags

__all__ = ["Output", "converse", "evaluate"]


@dataclass(frozen=True, slots=True)
class Output:
    """The files and formats of the results."""

    as_json: bool
    timeline: Path | None
    html: Path | None
    logits: Path | None
    routing: Path | None
    is_quiet: bool
    engine: Literal["pyggml", "llama"] = "pyggml"  #: who schedules
    expert_cache: CacheRule | None = None


@dataclass(slots=True)
class _Run:
    """A session and its report."""

    session: Session | LlamaModel
    tokenizer: Tokenizer
    output: Output
    report: RunReport
    recording: Recording | None
    routing: RoutingRecorder | None = None

    def finish(self) -> None:
        """Write the records and print the report, also after an error."""
        if not self.report.is_complete and not self.report.shapes:
            return  # nothing to report
        try:
            self._write()
        finally:
            self._print()

    def _write(self) -> None:
        if self.recording is not None:
            about = {
                "model": self.report.model,
                "devices": self.report.devices,
                "options": " ".join(filter(None, (given_options(), self._engine_words()))),
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
            write(self.routing.trace(), self.output.routing)

    def _engine_words(self) -> str:
        """Return who scheduled, if it was not pyggml."""
        if not isinstance(self.session, Session):
            return f"--engine llama (llama.cpp {self.session.build})"
        return ""

    def _print(self) -> None:
        if self.output.as_json:
            print_json({"engine": self.output.engine} | self.report.as_dict())
            return
        if self.report.text:
            click.echo()
        if not self.output.is_quiet:
            if self.report.text:
                click.echo()
            self.report.print(report())

    def emit(self, text: str) -> None:
        """Receive a piece of the answer."""
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
    """Evaluate a prompt or ids, generate, and report, also after an error."""
    start_s = time.perf_counter()
    with GGUFFile.open(model) as file:
        require_model(file)
        tokenizer = Tokenizer.from_gguf(file)
        encodes = ids is None
        if ids is None and (output.engine == "pyggml" or tokenizer.can_encode):
            ids = _encode(tokenizer, prompt, chat=chat, system=system)
        n_prompt = _most_tokens(tokenizer, prompt, chat=chat, system=system) if ids is None else len(ids)
        with _open(
            flags, file, tokenizer, output, start_s, n_tokens=n_prompt + n_predict, is_exact=ids is not None
        ) as run:
            if ids is None or (encodes and output.engine == "llama"):
                ids = _encode(run.tokenizer, prompt, chat=chat, system=system)
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
    """Answer each message until the input ends or ``/exit``, then report."""
    start_s = time.perf_counter()
    with GGUFFile.open(model) as file:
        require_model(file)
        tokenizer = Tokenizer.from_gguf(file)
        with _open(flags, file, tokenizer, output, start_s, n_tokens=None) as run:
            talk = Conversation(run.session, run.tokenizer, make_sampler(sampler))
            if system:
                talk.messages.append({"role": "system", "content": system})
            if sys.stdin.isatty():
                click.echo("Type a message. /help lists commands, Ctrl-D ends.", err=True)
            for text in _messages(talk, prompt):
                with run.report.timed("turns"):
                    talk.turn(text, n_predict, echo_piece)
                click.echo()


def echo_piece(text: str) -> None:
    """Print a piece of a model's text. On a terminal, control characters are made visible."""
    click.echo(visible(text) if sys.stdout.isatty() else text, nl=False)


@contextmanager
def _open(
    flags: ModelFlags,
    file: GGUFFile,
    tokenizer: Tokenizer,
    output: Output,
    start_s: float,
    *,
    n_tokens: int | None,
    is_exact: bool = True,
) -> Iterator[_Run]:
    """Open devices and the model for the block. When the block ends, write the records and the report.

    Parameters
    ----------
    start_s : float
        Start of the command, from ``time.perf_counter``.
    n_tokens : int or None
        Tokens that the context must hold; None for a conversation.
    is_exact : bool
        Whether it must hold so many; False: at most.
    """
    opened = _Opening(flags, file, output, n_tokens, is_exact=is_exact)
    account = CopyAccount()
    recording = Recording() if output.timeline or output.html else None
    with progress() as bar:
        task = bar.add_task(f"loading {Path(file.path).name} (MB)", total=None)

        def loaded(done: int, total: int) -> None:
            bar.update(task, completed=done // 10**6, total=-(-total // 10**6))

        session, backends = opened.open(_Tee(account, recording), loaded)
    clock = session.clock
    profile = backends[0].device.profile if len(backends) > 1 else None
    told = RunReport(
        model=about_model(file, opened.facts),
        devices=about_devices(backends, clock),
        account=account,
        link=None if profile is None else profile.link,
        virtual=None if clock is None else VirtualReport(clock, [b.name for b in backends]),
    )
    with session:
        told.seconds["kernels"], told.seconds["load"] = opened.kernels_s, opened.load_s
        told.watch(session, backends)
        for text in () if told.expert_cache is None else told.expert_cache.warnings():
            warn(text)
        routing = None if output.routing is None else RoutingRecorder(str(output.routing), opened.facts, file)
        if not isinstance(session, Session):
            from ..llama.tokenizer import LlamaTokenizer

            tokenizer = LlamaTokenizer(session, file)
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
            if not isinstance(session, Session) and output.expert_cache is not None:
                with suppress(PyggmlError):  # after an error the child may be gone
                    told.cache_log = session.finish()
            run.finish()


class _Opening:
    """The facts about a run before the model is open; `open` opens it in pyggml or in llama.cpp."""

    def __init__(
        self, flags: ModelFlags, file: GGUFFile, output: Output, n_tokens: int | None, *, is_exact: bool
    ) -> None:
        self.flags, self.file, self.output = flags, file, output
        self.facts: ModelFacts
        if output.engine == "llama":
            from ..llama.source import CapturedFacts

            self.facts = CapturedFacts.read(file, 0)
        else:
            self.facts = read_hparams(file)
        if n_tokens is not None:
            if is_exact:
                _check_room(flags, self.facts, n_tokens)
            n_tokens = min(max(n_tokens, 1), self.facts.n_ctx_train)
        self.context = flags.context(n_ctx=n_tokens)
        self.kernels_s = self.load_s = 0.0

    def open(self, recorder: Recorder, progress: Progress) -> tuple[Session | LlamaModel, list[Backend]]:
        """Open and return the model, and its backends with the CPU's last."""
        start_s = time.perf_counter()
        is_llama = self.output.engine == "llama"
        backends, cpu = open_backends(self.flags, data=not is_llama)
        if is_llama:
            warm_up(is_for_child=True)
        loading_s = time.perf_counter()
        opened = self._open_llama(recorder) if is_llama else self._open_session(backends, cpu, recorder, progress)
        loaded_s = time.perf_counter()
        if isinstance(opened, Session):  # compile after opening, so that an error comes first
            try:
                warm_up(opened)
            except BaseException:
                opened.close()
                raise
        self.load_s = loaded_s - loading_s
        self.kernels_s = time.perf_counter() - start_s - self.load_s
        return opened, [*backends, cpu]

    def _open_session(self, backends: list[Backend], cpu: Backend, recorder: Recorder, progress: Progress) -> Session:
        clock = virtual_clock([*backends, cpu])
        return Session.open(
            self.file,
            devices=backends,
            cpu=cpu,
            placement=self.flags.placement(),
            context=self.context,
            policy=self.flags.policy(),
            recorder=recorder,
            clock=clock,
            offload_rule=self.flags.offload_rule([*backends, cpu], clock, routing_of(self.file.tensors)),
            expert_cache=self.output.expert_cache,
            progress=progress,
        )

    def _open_llama(self, recorder: Recorder) -> LlamaModel:
        from ..llama import LlamaModel

        return LlamaModel(
            self.file.path,
            devices=device_names(self.flags),
            placement=self.flags.placement(),
            context=self.context,
            threads=self.flags.threads,
            recorder=recorder,
            watches_experts=self.output.logits is not None or self.output.routing is not None,
            moe_cache_bytes=getattr(self.output.expert_cache, "size_bytes", 0),
        )


def _check_room(flags: ModelFlags, hparams: ModelFacts, n_tokens: int) -> None:
    """Refuse a context that is too small before loading; warn if it is longer than the trained one."""
    if flags.n_ctx and n_tokens > flags.n_ctx:
        raise GraphError(
            f"the prompt and -n need {n_tokens} tokens, but -c is {flags.n_ctx}",
            hint=f"use -c {n_tokens} or more, or a shorter prompt",
        )
    if n_tokens > hparams.n_ctx_train:
        if not flags.n_ctx:
            raise GraphError(
                f"the prompt and -n need {n_tokens} tokens, but the model was trained with {hparams.n_ctx_train}",
                hint="use a shorter prompt, or set -c to use a longer context",
            )
        warn(f"the context is longer than the {hparams.n_ctx_train} tokens that the model was trained with")


def _evaluate_prompt(run: _Run, ids: list[int]) -> npt.NDArray[np.float32]:
    """Evaluate the prompt, and write its logits and chosen experts if requested."""
    last: npt.NDArray[np.float32]
    if run.output.logits is None and run.output.routing is None:
        last = run.session.decode(ids, outputs="last")[-1]
        return last
    topk = None if run.output.logits is None else TopK()
    if run.routing is not None:
        run.session.watcher = run.routing  # takes graphs of a session, and ids of llama.cpp
    logits = run.session.decode(ids, outputs="all", topk=topk)
    if run.output.logits is not None and topk is not None:
        _save(run.output.logits, logits=logits, topk=topk.ids)
    last = logits[-1]
    return last


def _save(path: Path, **arrays: npt.NDArray[np.generic]) -> None:
    """Write arrays to a file; `.npz` is appended as numpy does, unless the file exists."""
    with (
        aside(path if path.suffix == ".npz" or path.exists() else path.with_name(f"{path.name}.npz")) as part,
        part.open("wb") as file,
    ):
        savez: Callable[..., None] = np.savez  # typed as if an array could be its allow_pickle
        savez(file, **arrays)


def _generate(
    run: _Run, logits: npt.NDArray[np.float32], n_predict: int, flags: SamplerFlags, *, ignore_eos: bool
) -> None:
    """Generate ``n_predict`` tokens, or until the text ends."""
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


def _most_tokens(tokenizer: Tokenizer, prompt: str | None, *, chat: bool, system: str) -> int:
    """Return how many tokens a prompt has at most: one for each byte, and those that begin and end a text."""
    text = prompt or ""
    if chat:
        text = tokenizer.apply_chat_template(_conversation(prompt, system))
    return len(text.encode("utf-8", "replace")) + 3


def _conversation(prompt: str | None, system: str) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": prompt or ""}]


def _encode(tokenizer: Tokenizer, prompt: str | None, *, chat: bool, system: str) -> list[int]:
    if not tokenizer.has_vocabulary:
        return [0] if prompt is None else tokenizer.encode(prompt)
    if chat:
        return tokenizer.encode_chat(_conversation(prompt, system))
    ids = tokenizer.encode(prompt or "")
    if not ids:
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        ids = [0 if start is None else start]
    return ids


def _messages(talk: Conversation, first: str | None) -> Iterator[str]:
    """Yield the messages to the model: the prompt, then lines; execute lines that are commands."""
    if first is not None:
        yield first
    for line in _lines():
        try:
            command, argument = parse_line(line)
            if command == "/exit":
                return
            if command == "/help":
                click.echo(help_text(), err=True)
            elif (message := talk.execute(command, argument)) is not None:
                yield message
        except LineError as error:
            warn(str(error))


def _lines() -> Iterator[str]:
    """Yield the lines of the input that are not empty."""
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
    """Passes each record to several recorders."""

    def __init__(self, first: Recorder, second: Recording | None) -> None:
        self.recorders: list[Recorder] = [first] if second is None else [first, second]

    def record(self, record: Record) -> None:
        """Pass a record to each recorder."""
        for recorder in self.recorders:
            recorder.record(record)
