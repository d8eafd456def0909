"""A real ggml library through cffi: its functions as headers declare them, and the layout of its tensors.

Which rules a library goes by is found by what it exports (`Library.dialect`), not by what it says its version is: a build
of llama.cpp may say 0.26.0 and have the scheduler of 0.27. For tests, in a process of its own (`oracle.child`): an
assertion in the library ends the process, and its threads do not go with ours.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cffi

from pyggml.backends.libggml.library import TENSOR_STRUCT
from pyggml.dialect import DIALECTS, Dialect

#: llama.cpp's copy callback, a static member: what a build of llama.cpp gives the scheduler since ggml 0.27.
COPY_EXPERTS = "_ZN13llama_context18sched_copy_expertsEP12ggml_backendPK11ggml_tensorPS2_P11ggml_cgraphPv"

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
#: Functions that are newer than the headers of the package.
_NEWER = {
    "ggml_swiglu_clamp": "struct ggml_tensor * ggml_swiglu_clamp(struct ggml_context * ctx, struct ggml_tensor * a, "
    "struct ggml_tensor * b, float limit);",
    "ggml_prec_set_acc": "bool ggml_prec_set_acc(struct ggml_tensor * a, int prec);",
    "ggml_prec_set_src": "bool ggml_prec_set_src(struct ggml_tensor * a, int prec, int idx);",
    "ggml_rope_set_offset": "struct ggml_tensor * ggml_rope_set_offset(struct ggml_tensor * a, int n_offs);",
    "ggml_flash_attn_ext_set_n_kv_max": "void ggml_flash_attn_ext_set_n_kv_max(struct ggml_tensor * a, int32_t n);",
    "ggml_dsv4_hc_pre_gated": "struct ggml_tensor * ggml_dsv4_hc_pre_gated(struct ggml_context * ctx, struct ggml_tensor * x, "
    "struct ggml_tensor * gate, float scale);",
}
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


def _load_order(folder: Path) -> list[Path]:
    """Return the shared objects of a folder: what others need first, llama.cpp last, if it is there."""
    found = [next(iter(sorted(folder.glob(f"lib{name}.so*"))), None) for name in ("ggml-base", "ggml-cpu", "llama")]
    if found[0] is None:
        raise RuntimeError(f"{folder}: no libggml-base.so here")
    return [file for file in found if file is not None]


class Library:
    """The loaded library; one a process.

    Parameters
    ----------
    functions : iterable of str
        Names that may be called, beside those that every user needs; a name that this version lacks is left out.
    path : str, optional
        A shared object that holds all of ggml, or a folder with ``libggml-base.so``; the package ``libggml-python`` if not
        given. Its headers are that package's in either case.

    Raises
    ------
    RuntimeError
        It has tables that are not known here (`api`).

    Attributes
    ----------
    ffi : cffi.FFI
        For casts and buffers.
    version : str
        What it says it is, such as ``0.20.2``.
    dialect : Dialect
        The rules that it goes by.
    api : int
        Version of the tables that backends fill in: 2 (ggml 0.20 and 0.21) or 3 (since 0.26).
    """

    # cffi's handles are made at run time: they have no types of their own
    ffi: Any
    base: Any
    cpu: Any

    def __init__(self, functions: Iterable[str] = (), path: str | None = None) -> None:
        import libggml

        root = Path(libggml.__file__).parent
        self.ffi = ffi = cffi.FFI()
        prototypes = self.prototypes = {
            k: v
            for h in ("ggml.h", "ggml-cpu.h")
            for k, v in read_prototypes((root / "include" / h).read_text()).items()
        }
        prototypes.update(_NEWER)
        ffi.cdef(_STRUCTS)
        for name in dict.fromkeys((*_ALWAYS, *functions)):
            if name in prototypes:
                ffi.cdef(prototypes[name])
        folder = root / "lib64" if path is None else Path(path)
        files = _load_order(folder) if folder.is_dir() else [folder]
        self._files = [ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL) for file in files]
        handles = [ffi.dlopen(str(file), ffi.RTLD_NOW | ffi.RTLD_GLOBAL) for file in files]
        self.base, self.cpu = handles[0], handles[min(1, len(handles) - 1)]
        self.version = self.text(self.base.ggml_version()).split("-")[0]
        self.api = 3 if self.exports("ggml_op_alloc_size_may_expand") else 2
        if self.exports("ggml_backend_tensor_set_n"):
            raise RuntimeError(
                f"{folder}: a buffer's table has entries for many tensors at once, which live_mock.c lacks"
            )
        self.dialect = self._find_dialect()
        assert ffi.sizeof("struct ggml_tensor") == 336

    def exports(self, name: str) -> bool:
        """Whether the library has a function."""
        return any(hasattr(file, name) for file in self._files)

    def address(self, name: str) -> int:
        """Return where a function is."""
        file = next(file for file in self._files if hasattr(file, name))
        return ctypes.cast(getattr(file, name), ctypes.c_void_p).value or 0

    def _find_dialect(self) -> Dialect:
        """Return the rules that go with what is exported.

        Nothing that is exported tells 0.20 from 0.21: between these two the version does.
        """
        if self.exports("ggml_backend_sched_set_copy_callback"):
            has_realloc = self.exports("ggml_backend_sched_set_realloc_callback")
            return replace(DIALECTS["0.27"], realloc_callback=has_realloc)
        if self.api == 3:
            return DIALECTS["0.26"]
        return DIALECTS["0.20" if self.version < "0.21" else "0.21"]

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
