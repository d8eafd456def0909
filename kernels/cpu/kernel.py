"""`Kernel`: a function that is compiled, or loaded from the cache, when its address is first needed.

A plan contains addresses, so a program compiles only the kernels it uses, and no kernel is compiled into its caller.
Op kernels are decorated with `op_kernel`: ``f(ith, nth, d, ctl)`` for thread ith of nth, the descriptor at d and the
control block at ctl (`words`). `micro_kernel` makes one of an `Emit` body.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from .emit import micro, types
from .loading import LOADING

from numba import cfunc, njit  # isort: skip  (after the cache folder is set)
from .cache import CACHE_DIR, guard_files  # isort: skip

guard_files()

#: All kernels by name.
KERNELS: dict[str, Kernel] = {}
#: What `collecting` collects; None: nothing.
_FOUND: ContextVar[dict[str, Kernel] | None] = ContextVar("_FOUND", default=None)
_OPTIONS: dict[str, Any] = {"cache": True, "error_model": "numpy", "boundscheck": False}


class Kernel:
    """A function with C's calling convention: int64 arguments, and no result or an int64.

    Parameters
    ----------
    function : callable
        Python code that Numba compiles.
    n : int
        Number of arguments.
    rare : bool
        Whether `warm_up` leaves it out.
    answers : bool
        Whether it has a result.
    """

    __slots__ = ("_address", "_compiled", "_prototype", "answers", "function", "n", "name", "rare")

    def __init__(self, function: Callable[..., Any], n: int, *, rare: bool = False, answers: bool = False) -> None:
        self.rare, self.answers = rare, answers
        self.name: str = function.__name__
        self.function = function
        self.n = n
        self._address = 0
        self._compiled: Any = None  # Numba's object, which owns the code
        self._prototype: Any = None
        if KERNELS.setdefault(self.name, self) is not self:
            raise ValueError(f"two kernels are called {self.name}")

    @property
    def address(self) -> int:
        """Address of the code, which is compiled if necessary; see `collecting`."""
        return self._address or self._find()

    def _find(self) -> int:
        found = _FOUND.get()
        if found is None:
            return self._compile()
        found[self.name] = self
        return 1

    def _compile(self) -> int:
        with LOADING:
            if not self._address:
                result = types.int64 if self.answers else types.void
                self._compiled = cfunc(result(*[types.int64] * self.n), **_OPTIONS)(self.function)
                self._address = self._compiled.address
        return self._address

    @property
    def from_cache(self) -> bool:
        """Whether the code was found in the cache; False before the first use."""
        return self._compiled is not None and self._compiled.cache_hits > 0

    def __call__(self, *args: int) -> Any:
        """Run it, without the interpreter's lock."""
        if self._prototype is None:
            result = ctypes.c_int64 if self.answers else None
            self._prototype = ctypes.CFUNCTYPE(result, *[ctypes.c_int64] * self.n)(self.address)
        return self._prototype(*args)

    def __repr__(self) -> str:
        return f"<Kernel {self.name}>"


def kernel(n: int, *, rare: bool = False, answers: bool = False) -> Callable[[Callable[..., Any]], Kernel]:
    """Return a decorator that makes a kernel of a function of n arguments."""
    return lambda function: Kernel(function, n, rare=rare, answers=answers)


def op_kernel(function: Callable[[int, int, int, int], None]) -> Kernel:
    """Make the kernel of an op: ``f(ith, nth, d, ctl)``."""
    return Kernel(function, 4)


def rare_op_kernel(function: Callable[[int, int, int, int], None]) -> Kernel:
    """Make the kernel of an op that few models have: `warm_up` leaves it out."""
    return Kernel(function, 4, rare=True)


def micro_kernel(n: int, *, rare: bool = False) -> Callable[[Callable[..., None]], Kernel]:
    """Make a kernel of ``body(e, *args)`` with n arguments; see `Kernel`.

    Notes
    -----
    Numba's cache never finds functions that close over an intrinsic; so the wrapper is written out, with the
    intrinsic among its globals.
    """

    def wrap(body: Callable[..., None]) -> Kernel:
        name = body.__name__
        names = ", ".join(f"a{i}" for i in range(n))
        scope = {"body": micro(types.void, n)(body)}
        code = compile(f"def {name}({names}):\n    body({names})\n", body.__code__.co_filename, "exec")
        exec(code, scope)  # noqa: S102  (our own text)
        made: Any = scope[name]
        made.__module__ = body.__module__
        made.__doc__ = body.__doc__
        return Kernel(made, n, rare=rare)

    return wrap


#: A function of njit code that kernels call; compiled with its caller only.
device = njit(error_model="numpy")


def entry(n: int) -> Callable[[Callable[..., int]], Any]:
    """Return a decorator for what Python calls often: n int64 in, one out, without the interpreter's lock."""
    return njit(types.int64(*[types.int64] * n), nogil=True, **_OPTIONS)


@contextmanager
def collecting() -> Iterator[dict[str, Kernel]]:
    """Within the block, and this thread, addresses of kernels that are not loaded are 1: the kernels are only collected.

    Yields
    ------
    dict
        The kernels by name.
    """
    found: dict[str, Kernel] = {}
    token = _FOUND.set(found)
    try:
        yield found
    finally:
        _FOUND.reset(token)


def warm_up(progress: Callable[[str, int, int], None] | None = None, kernels: Sequence[Kernel] | None = None) -> None:
    """Compile kernels, or load them from the cache.

    If several are not in the cache and there is a second core, a second process compiles from the end of the list until
    the two meet. Each finds the other's kernels in the cache.

    Parameters
    ----------
    progress : callable, optional
        ``progress(name, i, n)``, before kernel i of n, and at the end with an empty name and i = n.
    kernels : sequence of Kernel, optional
        By default all but rare ones.
    """
    if kernels is None:
        kernels = common_kernels()
    helper = None
    if len(missing(kernels)) > 1 and (os.cpu_count() or 1) > 1:
        helper = _helper([k.name for k in reversed(kernels)])
    try:
        for i, kernel in enumerate(kernels):
            if progress is not None:
                progress(kernel.name, i, len(kernels))
            _ = kernel.address
    finally:
        if helper is not None:
            helper.kill()  # at most one kernel is half compiled, and what is in the cache is whole
            helper.wait()
    if progress is not None:
        progress("", len(kernels), len(kernels))


def missing(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Return the kernels that neither this process nor the cache has."""
    cached = {path.name.partition("-")[0].rpartition(".")[2] for path in Path(CACHE_DIR).rglob("*.nbi")}
    return [k for k in kernels if not k._address and k.name not in cached]


def common_kernels() -> list[Kernel]:
    """Return all kernels but rare ones, in an order that is always the same."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem != "__init__":
            importlib.import_module(f".{path.stem}", __package__)
    return [k for k in KERNELS.values() if not k.rare]


def _helper(names: list[str]) -> subprocess.Popen[bytes] | None:
    """Start a process that compiles kernels, unless they are made on first use."""
    code = (
        f"from {__name__} import KERNELS, common_kernels\ncommon_kernels()\n"
        f"for name in {names}:\n    if name in KERNELS: KERNELS[name].address"
    )
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    quiet = subprocess.DEVNULL
    try:
        return subprocess.Popen([sys.executable, "-c", code], env=env, stdin=quiet, stdout=quiet, stderr=quiet)
    except OSError:  # no process can be started: this one compiles alone
        return None
