"""A Jinja environment for untrusted templates: no access to Python's attributes, and limited time and output.

A template is a program. Its output, loops and calls are counted against a `Budget`. A single step that would make too
much (a width of a billion, a power, a product of texts) is refused before it runs.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import Undefined, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["Budget", "TooMuchError", "bounded_environment"]

#: Maximum length of a template in characters; the longest in llama.cpp's folder has 28,000.
MAX_SOURCE = 1 << 20
#: Limits of one rendering: seconds, loop turns and calls, characters and elements.
MAX_SECONDS, MAX_STEPS, MAX_MADE = 5.0, 200_000, 1 << 24
#: Largest number that filters, methods and operators accept: widths, counts, exponents.
MAX_ARGUMENT = 100_000
_WIDTH = re.compile(r"\d{6,}")


class TooMuchError(Exception):
    """A template exceeded its budget."""


class Budget:
    """The remaining time, steps, and characters and elements of a rendering.

    Parameters
    ----------
    n_given : int
        The length of the conversation in characters; a template may write it several times.
    """

    def __init__(self, n_given: int = 0) -> None:
        self.deadline_s = time.monotonic() + MAX_SECONDS
        self.n_steps, self.n_made = MAX_STEPS + n_given, MAX_MADE + 32 * n_given

    def step(self) -> None:
        """Count one loop turn or one call."""
        self.n_steps -= 1
        if self.n_steps < 0:
            raise TooMuchError("it takes too many steps")
        if self.n_steps % 256 == 0 and time.monotonic() > self.deadline_s:
            raise TooMuchError(f"it takes longer than {MAX_SECONDS:g} s")

    def make(self, n: int) -> None:
        """Count characters or elements before they are made."""
        self.n_made -= n
        if self.n_made < 0:
            raise TooMuchError("it makes too much text or lists that are too long")


class _Empty(Undefined):
    """A missing value: an empty text, as in llama.cpp and as users of transformers expect from ``text + tools``."""

    def __add__(self, other: Any) -> Any:  # of a template's values
        return other if isinstance(other, str) else self._fail_with_undefined_error()

    __radd__ = __add__


class _Generation(Extension):
    """``{% generation %}``, which marks the model's text in transformers; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))
    budget: Budget

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            undefined=_Empty,
            optimized=False,  # constants are folded while compiling, without a budget
        )
        self.budget = Budget()
        del self.globals["lipsum"]
        self.filters = {name: self._bounded(name, function) for name, function in self.filters.items()}
        self.filters |= {"_turns": self._turns, "_written": self._written, "_joined": self._joined}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter with a budget, like all others."""
        self.filters[name] = self._bounded(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            assert isinstance(loop.iter, nodes.Expr)
            loop.iter = _filtered("_turns", loop.iter)
        for output in list(tree.find_all(nodes.Output)):
            output.nodes = [
                _filtered("_written", nodes.Const(n.data) if isinstance(n, nodes.TemplateData) else n)
                for n in output.nodes
            ]
        for concat in list(tree.find_all(nodes.Concat)):
            concat.nodes = [_filtered("_joined", nodes.List(concat.nodes))]
        for node in tree.find_all(nodes.Node):
            node.set_environment(self)
        return tree

    # what a template does, counted

    def _turns(self, items: Iterable[Any] | None) -> Iterable[Any]:
        if items is None or isinstance(items, Undefined):
            return ()  # as in llama.cpp if no tools are given
        made = list(items)
        self.budget.make(len(made))
        return _Counted(made, self.budget)

    def _written(self, value: Any) -> Any:
        text = self._text(value)
        self.budget.make(len(text))
        return text

    def _joined(self, parts: list[Any]) -> str:
        texts = [self._text(part) for part in parts]
        self.budget.make(sum(map(len, texts)))
        return "".join(texts)

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            self.budget.make(_size(value))
        return str(value)

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        n_own = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            self._check(name, args[n_own:], named)
            return self._count(function(*args, **named))

        return call

    def call(self, context: Context, obj: Any, /, *args: Any, **named: Any) -> Any:
        """Call a function, macro or method of the template's."""
        name = str(getattr(obj, "__name__", ""))
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps `format`
        owner = getattr(method, "__self__", None)
        self._check(name, (*((owner,) if isinstance(owner, str) else ()), *args), named)
        return self._count(super().call(context, obj, *args, **named))

    def _check(self, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.budget.step()
        values = (*args, *named.values())
        if any(isinstance(v, int | float) and abs(v) > MAX_ARGUMENT for v in values[1:]):
            raise TooMuchError(f"{name} gets a number above {MAX_ARGUMENT:,}")
        texts = [v for v in values if isinstance(v, str)]
        if name in ("format", "format_map") and texts and _WIDTH.search(texts[0]):
            raise TooMuchError("it formats with a width above 99,999")
        if name == "replace" and len(texts) > 2:
            self.budget.make(texts[0].count(texts[1]) * len(texts[2]))
        elif name in ("join", "indent", "expandtabs") and len(values) > 1:
            # one may repeat the other: parts and their separator, lines and their indentation
            sizes = sorted(v if isinstance(v, int) else _size(v) for v in values[:2])
            self.budget.make(sizes[0] * sizes[1])
        elif name in ("string", "tojson", "pprint", "wordwrap"):
            self.budget.make(2 * _size(values[0]))
        elif name == "sum" and any(isinstance(v, list | tuple) for v in values[1:]):
            self.budget.make(_length(values[0]) * _size(values[0]))  # lists are concatenated one by one

    def _count(self, made: Any) -> Any:
        self.budget.make(_length(made))
        return made

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator whose result can be much longer than its operands."""
        if operator in ("*", "**"):
            for count, other in ((left, right), (right, left)):
                if isinstance(count, int) and not isinstance(other, int | float):
                    self.budget.make(_length(other) * max(count, 0))
            if isinstance(left, int) and isinstance(right, int) and operator == "**":
                self.budget.make(64 * left.bit_length() * max(right, 0))
            elif isinstance(left, int) and isinstance(right, int):
                self.budget.make(64 * (left.bit_length() + right.bit_length()))
        elif operator == "%" and isinstance(left, str):
            if _WIDTH.search(left) or "*" in left:
                raise TooMuchError("it formats with a width above 99,999")
        elif operator == "+":
            self.budget.make(_length(left) + _length(right))
        return super().call_binop(context, operator, left, right)


class _Counted:
    """The elements of a loop; each turn is a step."""

    def __init__(self, items: list[Any], budget: Budget) -> None:
        self._items, self._budget = items, budget

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._budget.step()
            yield item


def _size(value: Any) -> int:
    """Return the number of elements of a value, including nested ones; stops above any budget."""
    n, left = 0, [value]
    while left and n <= 2 * MAX_MADE:
        value = left.pop()
        if isinstance(value, Mapping):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | range):
            if len(value) > MAX_MADE // 16:
                return 2 * MAX_MADE
            left += value
        n += 1 + (len(value) if isinstance(value, str) else 0)
    return n


def _length(value: Any) -> int:
    """Return the number of characters or elements of a value."""
    return len(value) if isinstance(value, str | bytes | list | tuple | dict | set) else 0


def _filtered(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def bounded_environment() -> _Environment:
    """Return an environment; its `budget` must be set before each rendering."""
    return _Environment()
