"""`pyggml run`: evaluate a prompt, generate text, report what was copied and what was saved."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import FormatError, GraphError, PyggmlError
from ._console import print_json, progress, report, warn
from ._kernels import warm_up
from ._model_options import ModelFlags, model_options, open_backends
from ._page import check_folders, given_options, write_records
from ._run_report import RunReport

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..backend import Backend
    from ..record import Record, Recorder, Recording
    from ..sampling import SamplerFlags
    from ..session import Session
    from ..tokenizer import Tokenizer

__all__ = ["command"]

#: Most tokens of an answer under --interactive if -n does not say.
DEFAULT_ANSWER = 256


@dataclass(frozen=True, slots=True)
class Output:
    """Where results go."""

    as_json: bool
    timeline: Path | None
    html: Path | None
    logits: Path | None
    routing: Path | None
    is_quiet: bool


@click.command("run")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="Text to go on from.")
@click.option("--tokens", metavar="1,2,3", help="The prompt as token ids instead.")
@click.option("-n", "--n-predict", type=click.IntRange(0), default=0, show_default=True, help="Tokens to generate.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's own chat template.")
@click.option("-i", "--interactive", is_flag=True, help="Take turns: a line is a prompt, the cache stays between them.")
@click.option("--system", default="", help="With --chat or -i: what the system says first.")
@click.option("--temp", type=click.FloatRange(0), default=0.0, show_default=True, help="Temperature; 0 is greedy.")
@click.option("--top-k", type=click.IntRange(0), default=40, show_default=True)
@click.option("--top-p", type=click.FloatRange(0, 1), default=0.95, show_default=True)
@click.option("--min-p", type=click.FloatRange(0, 1), default=0.05, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--ignore-eos", is_flag=True, help="Go on after the end of the text.")
@click.option("--timeline", type=click.Path(path_type=Path), help="Write a timeline for Perfetto and `pyggml viz`.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page that shows what happened and why.")
@click.option("--dump-logits", type=click.Path(path_type=Path), help="Write logits and chosen experts of the prompt.")
@click.option("--record-routing", type=click.Path(path_type=Path),
              help="Write the experts that the prompt's tokens choose, for `splits --routing trace:FILE`.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="Print the text only, no report.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON document.")
@model_options
def command(
    flags: ModelFlags,
    model: Path,
    prompt: str | None,
    tokens: str | None,
    n_predict: int,
    chat: bool,
    interactive: bool,
    system: str,
    temp: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    ignore_eos: bool,
    timeline: Path | None,
    html: Path | None,
    dump_logits: Path | None,
    record_routing: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Evaluate a prompt with a GGUF model over several devices, generate, and report.

    Without --prompt or --tokens the model begins by itself.
    """
    if prompt is not None and tokens is not None:
        raise click.UsageError("give either --prompt or --tokens")
    if chat and prompt is None:
        raise click.UsageError("--chat needs a --prompt")
    if interactive and (as_json or tokens is not None or dump_logits is not None or record_routing is not None):
        raise click.UsageError(
            "--interactive goes with text only, not with --json, --tokens, --dump-logits or --record-routing"
        )
    check_folders(timeline, html, dump_logits, record_routing)
    from ..sampling import SamplerFlags

    sampler = SamplerFlags(temperature=temp, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    sampler.check()
    run = _Run(flags, model, Output(as_json, timeline, html, dump_logits, record_routing, quiet))
    if interactive:
        run.converse(prompt, n_predict or DEFAULT_ANSWER, sampler, system=system)
        return
    ids = _parse_ids(tokens) if tokens is not None else None
    run.go(prompt, ids, n_predict, sampler, chat=chat, system=system, ignore_eos=ignore_eos)


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise click.UsageError(f"--tokens {text}: ids are numbers with commas between") from None


class _Run:
    """One run, from the file to the report."""

    def __init__(self, flags: ModelFlags, model: Path, output: Output) -> None:
        self.flags = flags
        self.model = model
        self.output = output
        self.report: RunReport | None = None

    def go(
        self,
        prompt: str | None,
        ids: list[int] | None,
        n_predict: int,
        sampler: SamplerFlags,
        *,
        chat: bool,
        system: str,
        ignore_eos: bool,
    ) -> None:
        """Run, and report however it ends."""
        from ..gguf import GGUFFile
        from ..tokenizer import Tokenizer

        start_s = time.perf_counter()
        with GGUFFile.open(self.model) as file:
            tokenizer = Tokenizer.from_gguf(file)
            if ids is None:
                ids = _encode(tokenizer, prompt, chat=chat, system=system)
            self._check_room(file.metadata, len(ids) + n_predict)
            backends, cpu = open_backends(self.flags)
            warm_up()
            load_s = time.perf_counter()
            session = self._open(file, backends, cpu, len(ids) + n_predict)
            with session:
                assert self.report is not None
                self.report.seconds["load"] = time.perf_counter() - load_s
                self.report.watch(session)
                self.report.prompt_tokens = ids
                try:
                    self._evaluate(session, tokenizer, ids, n_predict, sampler, ignore_eos=ignore_eos)
                    self.report.is_complete = True
                except KeyboardInterrupt:
                    self.report.stopped = "interrupted"
                    raise
                except PyggmlError as error:
                    self.report.stopped = str(error)
                    raise
                finally:
                    self.report.seconds["total"] = time.perf_counter() - start_s
                    self._finish()

    def converse(self, prompt: str | None, n_predict: int, sampler: SamplerFlags, *, system: str) -> None:
        """Take turns until the input ends, then report."""
        from ..gguf import GGUFFile
        from ..sampling import make_sampler
        from ..tokenizer import Tokenizer
        from ._conversation import Conversation

        start_s = time.perf_counter()
        with GGUFFile.open(self.model) as file:
            tokenizer = Tokenizer.from_gguf(file)
            backends, cpu = open_backends(self.flags)
            warm_up()
            with self._open(file, backends, cpu, None) as session:
                assert self.report is not None
                self.report.watch(session)
                talk = Conversation(session, tokenizer, make_sampler(sampler))
                if system:
                    talk.messages.append({"role": "system", "content": system})
                try:
                    for text in _lines(prompt):
                        with self.report.timed("turns"):
                            talk.turn(text, n_predict, lambda piece: click.echo(piece, nl=False))
                        click.echo()
                    self.report.is_complete = True
                finally:
                    self.report.seconds["total"] = time.perf_counter() - start_s
                    self._finish()

    def _check_room(self, metadata: object, needed: int) -> None:
        """Refuse a context that is too small before anything is loaded."""
        if self.flags.n_ctx and needed > self.flags.n_ctx:
            raise GraphError(
                f"the prompt and -n need {needed} tokens, -c gives {self.flags.n_ctx}",
                hint=f"use -c {needed} or more, or a shorter prompt",
            )

    def _open(self, file: object, backends: list[Backend], cpu: Backend, needed: int | None) -> Session:
        from ..gguf import GGUFFile
        from ..models.hparams import HParams
        from ..planning import virtual_clock
        from ..record import Recording
        from ..report import CopyAccount
        from ..session import Session
        from ._virtual import VirtualReport

        assert isinstance(file, GGUFFile)
        hparams = HParams.from_gguf(file)
        if needed is not None and needed > hparams.n_ctx_train:
            if not self.flags.n_ctx:
                raise GraphError(
                    f"the prompt and -n need {needed} tokens, the model was trained with {hparams.n_ctx_train}",
                    hint="use a shorter prompt, or -c to go beyond",
                )
            warn(f"the context is longer than the {hparams.n_ctx_train} tokens that the model was trained with")
        account = CopyAccount()
        self.recording = Recording() if self.output.timeline or self.output.html else None
        self.report = RunReport(
            model=_describe(file.path, hparams),
            devices=[{"name": b.name, "description": b.device.description} for b in (*backends, cpu)],
            account=account,
        )
        clock = virtual_clock([*backends, cpu])
        if clock is not None:
            self.report.virtual = VirtualReport(clock, [b.name for b in (*backends, cpu)])
        profile = backends[0].device.profile if backends else None
        if profile is not None:
            self.report.link_bytes_per_s = profile.link.bytes_per_s
        with progress() as bar:
            task = bar.add_task(f"loading {self.model.name}", total=None)
            return Session.open(
                file,
                devices=backends,
                cpu=cpu,
                placement=self.flags.placement(),
                context=self.flags.context(n_ctx=None if needed is None else min(max(needed, 1), hparams.n_ctx_train)),
                copier=self.flags.copier(),
                recorder=_Tee(account, self.recording),
                clock=clock,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )

    def _evaluate(
        self,
        session: Session,
        tokenizer: Tokenizer,
        ids: list[int],
        n_predict: int,
        flags: SamplerFlags,
        *,
        ignore_eos: bool,
    ) -> None:
        from ..sampling import make_sampler
        from ..tokenizer import StreamDecoder

        assert self.report is not None
        found = self.report
        with found.timed("prompt"):
            logits = self._prompt(session, ids)
        found.n_prompt = len(ids)
        if n_predict == 0:
            return
        found.account.phase = "generate"
        sampler = make_sampler(flags)
        stop = frozenset() if ignore_eos else frozenset(tokenizer.eog_ids)
        decoder = StreamDecoder(tokenizer)
        with found.timed("generate"):
            for id in session.continue_from(logits, n_predict, sampler, stop=stop):
                found.tokens.append(id)
                found.n_generated += 1
                self._emit(decoder.feed(id))
        self._emit(decoder.flush())
        if found.n_generated < n_predict:
            found.stopped = "end of text"

    def _prompt(self, session: Session, ids: list[int]) -> npt.NDArray[np.float32]:
        """Evaluate the prompt; write all its logits, or what experts it used, if that was asked for."""
        last: npt.NDArray[np.float32]
        if self.output.logits is None and self.output.routing is None:
            last = session.decode(ids, outputs="last")[-1]
            return last
        from numpy import savez

        from ..session import TopK

        topk = TopK()
        logits = session.decode(ids, outputs="all", topk=topk)
        if self.output.logits is not None:
            savez(self.output.logits, logits=logits, topk=topk.ids)
        if self.output.routing is not None:
            savez(self.output.routing, topk=topk.ids)
        last = logits[-1]
        return last

    def _emit(self, text: str) -> None:
        assert self.report is not None
        self.report.text += text
        if not self.output.as_json and text:
            click.echo(text, nl=False)

    def _finish(self) -> None:
        """Print the report, complete or not."""
        assert self.report is not None
        if not self.report.is_complete and not self.report.shapes:
            return  # nothing happened that is worth a report
        if self.recording is not None:
            about = {"model": self.report.model, "devices": self.report.devices, "options": given_options()}
            write_records(
                self.recording.records,
                about,
                timeline=self.output.timeline,
                html=self.output.html,
                name=self.model.stem,
            )
        if self.output.as_json:
            print_json(self.report.as_dict())
            return
        if self.report.text:
            click.echo()
        if not self.output.is_quiet:
            if self.report.text:
                click.echo()
            self.report.print(report())


def _encode(tokenizer: Tokenizer, prompt: str | None, *, chat: bool, system: str) -> list[int]:
    if not tokenizer.has_vocabulary:
        if prompt is None:
            return [0]
        raise FormatError("the model", "it has no vocabulary", hint="give the prompt as --tokens")
    if chat:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt or ""})
        return tokenizer.encode(tokenizer.apply_chat_template(messages), add_special=False)
    ids = tokenizer.encode(prompt or "")
    if not ids:
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        ids = [0 if start is None else start]
    return ids


def _describe(path: object, hparams: object) -> dict[str, object]:
    from ..models.hparams import HParams

    assert isinstance(hparams, HParams)
    return {
        "path": str(path),
        "name": hparams.name,
        "arch": hparams.arch,
        "n_layer": hparams.n_layer,
        "n_expert": hparams.n_expert,
        "n_expert_used": hparams.n_expert_used,
    }


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
