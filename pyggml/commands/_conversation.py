"""`run --interactive`: a conversation whose KV cache keeps the unchanged part of the text."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FormatError, PyggmlError
from ..files import read_text

if TYPE_CHECKING:
    from ..llama import LlamaModel
    from ..sampling import Sampler
    from ..session import Session
    from ..tokenizer import Tokenizer

__all__ = ["Conversation", "LineError", "common_prefix", "help_text", "parse_line"]

#: The commands of a conversation, with their arguments and what they do.
COMMANDS = {
    "/help": ("", "Show this list."),
    "/clear": ("", "Start a new conversation; the system message is kept."),
    "/regen": ("", "Generate the last answer again."),
    "/read": ("FILE", "Send the text of a file."),
    "/exit": ("", "End the conversation and print the report, like Ctrl-D."),
}


class LineError(PyggmlError):
    """A line that begins with a slash and cannot be executed; the conversation continues."""


def help_text() -> str:
    """Return what a user can type."""
    rows = [(f"{name} {argument}".rstrip(), what) for name, (argument, what) in COMMANDS.items()]
    rows.append(("//TEXT", "Send a message that begins with a slash."))
    return "\n".join(["Each line is a message to the model, or one of:", *(f"  {a:<11} {b}" for a, b in rows)])


def parse_line(line: str) -> tuple[str, str]:
    """Return the command of a line and its argument, or an empty command and the message.

    Raises
    ------
    LineError
        There is no such command, or its argument is missing.

    Examples
    --------
    >>> parse_line("/read notes.txt"), parse_line("hello"), parse_line("//etc is a folder")
    (('/read', 'notes.txt'), ('', 'hello'), ('', '/etc is a folder'))
    """
    if not line.startswith("/"):
        return "", line
    if line.startswith("//"):
        return "", line[1:]
    word, _, argument = line.partition(" ")
    if word not in COMMANDS:
        near = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.5)
        nearest = f"did you mean {near[0]}? " if near else ""
        raise LineError(f"there is no command {word}", hint=f"{nearest}/help lists commands, /{line} sends the line")
    if COMMANDS[word][0] and not argument.strip():
        raise LineError(f"{word} needs an argument: {word} {COMMANDS[word][0]}")
    return word, argument.strip()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many leading elements are equal.

    Examples
    --------
    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


@dataclass(slots=True)
class Conversation:
    """The messages, and the token ids that are in the session's cache."""

    session: Session | LlamaModel
    tokenizer: Tokenizer
    sampler: Sampler
    messages: list[dict[str, str]] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    n_reused: int = 0  #: tokens of the latest turn that were already in the cache

    def clear(self) -> None:
        """Remove all messages except the system message."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def take_back(self) -> str:
        """Remove the last message and its answer, and return the message.

        Raises
        ------
        LineError
            There is no answer yet.
        """
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise LineError("there is no answer to generate again")
        self.messages.pop()
        return self.messages.pop()["content"]

    def execute(self, command: str, argument: str) -> str | None:
        """Execute a command of `parse_line` that concerns the messages; return the message to send, if any.

        Raises
        ------
        LineError
            The command cannot be executed.
        """
        if command == "/clear":
            self.clear()
            return None
        if command == "/regen":
            return self.take_back()
        return _read(Path(argument).expanduser()) if command == "/read" else argument

    def turn(self, text: str, n_predict: int, emit: Callable[[str], None]) -> str:
        """Send a message and return the answer; ``emit`` receives it piece by piece.

        Raises
        ------
        CacheFullError
            The conversation is longer than the context. The message is removed again.
        """
        from ..tokenizer import StreamDecoder

        self.messages.append({"role": "user", "content": text})
        try:
            ids = self.tokenizer.encode_chat(self.messages)
            # at least one token must be evaluated to get logits
            self.n_reused = min(common_prefix(self.cached, ids), len(ids) - 1)
            if not self.session.can_rewind(self.n_reused):
                self.n_reused = 0
            self.session.rewind(self.n_reused)
            logits = self.session.decode(ids[self.n_reused :])[-1]
        except BaseException:
            self.messages.pop()
            self.cached = self.cached[: self.session.n_past]
            raise
        decoder = StreamDecoder(self.tokenizer)
        answer, given = "", list(ids)
        for id in self.session.continue_from(logits, n_predict, self.sampler, stop=self.tokenizer.eog_ids):
            given.append(id)
            answer += (piece := decoder.feed(id))
            emit(piece)
        answer += (piece := decoder.flush())
        emit(piece)
        self.cached = given[: self.session.n_past]  # the last token that was drawn is not evaluated
        self.messages.append({"role": "assistant", "content": answer})
        return answer


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except FormatError as error:
        raise LineError(f"/read {error}") from error
