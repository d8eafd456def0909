"""The real ggml library through cffi: its functions as its own headers declare them, and the layout of its tensors.

For tests, in a process of its own (`oracle.child`): an assertion in the library ends the process, and its
threads do not go with ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import cffi

from pyggml.backends.libggml.library import TENSOR_STRUCT

#: The version whose structs are stated here; another is refused, as they would have to be checked first.
VERSION = "0.20.2"

_STRUCTS = (
    TENSOR_STRUCT
    + """
struct ggml_hash_set { size_t size; uint32_t * used; struct ggml_tensor ** keys; };
struct ggml_cgraph {
    int size, n_nodes, n_leafs;
    struct ggml_tensor ** nodes, ** grads, ** grad_accs, ** leafs;
    int32_t * use_counts;
    struct ggml_hash_set visited;
    int order;
    uint64_t uid;
};
struct ggml_context;
const char * ggml_version(void);
void ggml_set_abort_callback(void (*callback)(const char *));
"""
)
_ALWAYS = (
    "ggml_init", "ggml_free", "ggml_new_tensor_4d", "ggml_nbytes", "ggml_op_name", "ggml_type_name",
    "ggml_new_graph", "ggml_build_forward_expand", "ggml_graph_overhead", "ggml_tensor_overhead",
    "ggml_graph_compute_with_ctx", "ggml_cpu_init",
)  # fmt: skip
_PROTOTYPE = re.compile(r"GGML_(?:BACKEND_)?API\s+([\w\s*]+?\b(ggml_\w+)\s*\([^()]*\))")


def read_prototypes(header: str) -> dict[str, str]:
    """Return the declaration of each function of a header, in words that cffi understands.

    Enums are ints; the few macros for array sizes are their values.
    """
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", header, flags=re.DOTALL)
    found = {}
    for declaration, name in _PROTOTYPE.findall(text):
        plain = re.sub(r"\benum\s+\w+", "int", declaration).replace("GGML_MROPE_SECTIONS", "4")
        found[name] = re.sub(r"\s+", " ", plain) + ";"
    return found


class Library:
    """The loaded library; one a process.

    Parameters
    ----------
    functions : iterable of str
        Names that may be called, beside those that every user needs; a name that this version lacks is left out.

    Attributes
    ----------
    ffi : cffi.FFI
        For casts and buffers.
    version : str
        Upstream's, such as ``0.20.2``.
    """

    # cffi's handles are made at run time: they have no types of their own
    ffi: Any
    base: Any
    cpu: Any

    def __init__(self, functions: Iterable[str] = ()) -> None:
        import libggml

        root = Path(libggml.__file__).parent
        self.ffi = ffi = cffi.FFI()
        prototypes = self.prototypes = {
            k: v
            for h in ("ggml.h", "ggml-cpu.h")
            for k, v in read_prototypes((root / "include" / h).read_text()).items()
        }
        ffi.cdef(_STRUCTS)
        for name in dict.fromkeys((*_ALWAYS, *functions)):
            if name in prototypes:
                ffi.cdef(prototypes[name])
        lib = root / "lib64"
        self.base = ffi.dlopen(str(lib / "libggml-base.so"), ffi.RTLD_NOW | ffi.RTLD_GLOBAL)
        self.cpu = ffi.dlopen(str(lib / "libggml-cpu.so"), ffi.RTLD_NOW | ffi.RTLD_GLOBAL)
        self.version = self.text(self.base.ggml_version()).split("-")[0]
        if self.version != VERSION:
            raise RuntimeError(f"libggml is {self.version}; the layout of {VERSION} is known here")
        assert ffi.sizeof("struct ggml_tensor") == 336

    def text(self, p: Any) -> str:  # a cffi char pointer
        """Return a C string."""
        found: str = "" if p == self.ffi.NULL else self.ffi.string(p).decode()
        return found

    def function(self, name: str) -> Any:
        """Return a declared function, from the library that has it; None if this version lacks it."""
        for lib in (self.base, self.cpu):
            found = getattr(lib, name, None)
            if found is not None:
                return found
        return None

    @cached_property
    def type_of(self) -> dict[str, int]:
        """Numbers of the element types by name."""
        names = {self.text(self.base.ggml_type_name(i)): i for i in range(42, -1, -1)}
        return {name: i for name, i in names.items() if name not in ("", "DEPRECATED", "NONE")}

    def new_context(self, mem_size: int, *, with_data: bool = False) -> Any:
        """Return a context that holds ``mem_size`` bytes; its tensors have data if asked for."""
        ffi = self.ffi
        params = ffi.new("struct ggml_init_params *", {"mem_size": mem_size, "no_alloc": not with_data})
        return self.base.ggml_init(params[0])

    def on_abort(self, callback: Any) -> None:
        """Have ``callback(message)`` called when an assertion fails, before the process ends."""
        ffi = self.ffi
        self._abort = ffi.callback("void(const char *)", lambda p: callback(self.text(p)))
        self.base.ggml_set_abort_callback(self._abort)
