"""A real ggml, loaded: its functions through cffi, and what this build of it calls its ops and types.

Any build will do that has ggml's registry of devices: the package ``libggml-python``, a build of llama.cpp, another
package's shared object. Versions number their ops differently and may lay out ``struct ggml_tensor`` differently, so
nothing of that is taken for granted: ops are looked up by name, sub-ops by asking the library's own builders, and the
fields of the struct that are written here are first read back from tensors which the library itself made. A library
that does not agree is refused before anything is computed.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import re
import sys
from pathlib import Path
from typing import Any

from ... import config
from ...errors import DeviceUnavailableError
from ...types import GluOp, Op, Type, UnaryOp

__all__ = ["TENSOR_STRUCT", "Library", "find_library", "load_library"]

#: As ggml has laid it out since 0.9; `Library` verifies each field. Later versions may go on after ``extra``.
TENSOR_STRUCT = """
struct ggml_tensor {
    int type;
    void * buffer;
    int64_t ne[4];
    size_t nb[4];
    int op;
    int32_t op_params[16];
    int32_t flags;
    struct ggml_tensor * src[10];
    struct ggml_tensor * view_src;
    size_t view_offs;
    void * data;
    char name[64];
    void * extra;
    char padding[8];
};
struct ggml_init_params { size_t mem_size; void * mem_buffer; bool no_alloc; };
"""
_FUNCTIONS = """
const char * ggml_version(void);
void ggml_log_set(void (*callback)(int, const char *, void *), void * user_data);
void * ggml_init(struct ggml_init_params params);
void ggml_free(void * ctx);
size_t ggml_tensor_overhead(void);
size_t ggml_graph_overhead_custom(size_t size, bool grads);
const char * ggml_op_name(int op);
const char * ggml_type_name(int type);
int64_t ggml_blck_size(int type);
size_t ggml_type_size(int type);
struct ggml_tensor * ggml_new_tensor_4d(void * ctx, int type, int64_t, int64_t, int64_t, int64_t);
struct ggml_tensor * ggml_set_name(struct ggml_tensor * tensor, const char * name);
void ggml_set_output(struct ggml_tensor * tensor);
struct ggml_tensor * ggml_view_2d(void * ctx, struct ggml_tensor *, int64_t, int64_t, size_t nb1, size_t offset);
struct ggml_tensor * ggml_scale(void * ctx, struct ggml_tensor * a, float s);
struct ggml_tensor * ggml_mul_mat_id(void * ctx, struct ggml_tensor *, struct ggml_tensor *, struct ggml_tensor *);
void * ggml_new_graph_custom(void * ctx, size_t size, bool grads);
void ggml_build_forward_expand(void * cgraph, struct ggml_tensor * tensor);
int ggml_graph_n_nodes(void * cgraph);

void ggml_backend_load_all_from_path(const char * dir_path);
size_t ggml_backend_dev_count(void);
void * ggml_backend_dev_get(size_t index);
const char * ggml_backend_dev_name(void * device);
const char * ggml_backend_dev_description(void * device);
void ggml_backend_dev_memory(void * device, size_t * free, size_t * total);
int ggml_backend_dev_type(void * device);
void * ggml_backend_dev_backend_reg(void * device);
void * ggml_backend_dev_init(void * device, const char * params);
void * ggml_backend_dev_buffer_type(void * device);
void * ggml_backend_dev_host_buffer_type(void * device);
bool ggml_backend_dev_supports_op(void * device, const struct ggml_tensor * op);
bool ggml_backend_dev_supports_buft(void * device, void * buft);
bool ggml_backend_dev_offload_op(void * device, const struct ggml_tensor * op);
void * ggml_backend_reg_get_proc_address(void * reg, const char * name);

const char * ggml_backend_buft_name(void * buft);
void * ggml_backend_buft_alloc_buffer(void * buft, size_t size);
size_t ggml_backend_buft_get_alignment(void * buft);
size_t ggml_backend_buft_get_max_size(void * buft);
size_t ggml_backend_buft_get_alloc_size(void * buft, const struct ggml_tensor * tensor);
bool ggml_backend_buft_is_host(void * buft);

void * ggml_backend_cpu_buffer_from_ptr(void * ptr, size_t size);
void * ggml_backend_buffer_get_type(void * buffer);
void ggml_backend_buffer_free(void * buffer);
void * ggml_backend_buffer_get_base(void * buffer);
size_t ggml_backend_buffer_get_size(void * buffer);
void ggml_backend_buffer_clear(void * buffer, uint8_t value);
void ggml_backend_buffer_set_usage(void * buffer, int usage);
void ggml_backend_buffer_reset(void * buffer);
int ggml_backend_tensor_alloc(void * buffer, struct ggml_tensor * tensor, void * addr);
int ggml_backend_view_init(struct ggml_tensor * tensor);
void ggml_backend_tensor_set(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size);
void ggml_backend_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t size);
void ggml_backend_tensor_copy(struct ggml_tensor * src, struct ggml_tensor * dst);

void ggml_backend_free(void * backend);
void ggml_backend_synchronize(void * backend);
int ggml_backend_graph_compute_async(void * backend, void * cgraph);
void ggml_backend_tensor_set_async(void * backend, struct ggml_tensor *, const void * data, size_t offset, size_t size);
void ggml_backend_tensor_get_async(void * backend, const struct ggml_tensor *, void * data, size_t offset, size_t size);
void ggml_backend_tensor_copy_async(void * src, void * dst, struct ggml_tensor *, struct ggml_tensor *);
void * ggml_backend_event_new(void * device);
void ggml_backend_event_free(void * event);
void ggml_backend_event_record(void * event, void * backend);
void ggml_backend_event_synchronize(void * event);
void ggml_backend_event_wait(void * backend, void * event);
"""
_KIND = "libggml"
_TENSOR = "struct ggml_tensor *"
#: Builders of sub-ops that take more than a tensor: types, and a value or None for the tensor itself.
_TAKES_MORE = {
    "SWIGLU_OAI": ((_TENSOR, None), ("float", 1.0), ("float", 1.0)),
    "SWIGLU_CLAMP": ((_TENSOR, None), ("float", 1.0)),
    "XIELU": (("float", 0.0),) * 4,
}
#: The last op of every version since 0.9: where the table of names is known to end no earlier.
_LAST_OP = "GLU"
_MAX_OPS = 256
#: Types from here on are asked for only where the table of names is known to reach so far.
_FIRST_LATE_TYPE, _LATE_TYPES_SINCE = 40, (0, 20)
_LOG_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR, 5: logging.INFO}
_log = logging.getLogger("pyggml.libggml")

# cffi's handles and structs are made at run time: they have no types of their own
Handle = Any


class Library:
    """A loaded ggml.

    Parameters
    ----------
    path : Path
        Of the shared object that has the registry of devices.

    Attributes
    ----------
    ffi, lib
        Of cffi: for casts and buffers, and the functions.
    version : str
        Such as ``0.20.2``.
    ops : dict of Op to int
        What the library calls our ops; one that it lacks is not in it.
    sub_ops : dict of (Op, int) to int
        Likewise, first parameter words of UNARY and GLU.
    types : frozenset of Type
        Element types that it has.

    Raises
    ------
    DeviceUnavailableError
        It cannot be loaded, is no ggml, is too old, or its structs are laid out in a way that is not known here.
    """

    ffi: Any
    lib: Any

    def __init__(self, path: Path) -> None:
        import cffi

        self.path = path
        self.ffi = ffi = cffi.FFI()
        ffi.cdef(TENSOR_STRUCT)
        ffi.cdef(_FUNCTIONS)
        self._word = ffi.typeof("uintptr_t")
        try:
            # local: two builds in one process must not take each other's functions
            self.lib = ffi.dlopen(str(path), ffi.RTLD_NOW | getattr(ffi, "RTLD_LOCAL", 0))
        except OSError as error:
            raise DeviceUnavailableError(_KIND, f"{path} cannot be loaded: {error}") from error
        self.version = self._read_version()
        self._take_log()
        self.ops = self._read_ops()
        self.types = self._read_types()
        self._check_layout()
        self.sub_ops = self._read_sub_ops()
        if self.lib.ggml_backend_dev_count() == 0 and self.has("ggml_backend_load_all_from_path"):
            self.lib.ggml_backend_load_all_from_path(str(path.parent).encode())

    # -- words ---------------------------------------------------------------

    def text(self, p: Handle) -> str:
        """Return a C string."""
        found: str = "" if p == self.ffi.NULL else self.ffi.string(p).decode(errors="replace")
        return found

    def has(self, name: str) -> bool:
        """Whether this build has a function."""
        return getattr(self.lib, name, None) is not None

    def address(self, p: Handle) -> int:
        """Return a pointer as a number."""
        return int(self.ffi.cast(self._word, p))

    def pointer(self, address: int) -> Handle:
        """Return a number as a pointer."""
        return self.ffi.cast("void *", address)

    # -- contexts ------------------------------------------------------------

    def new_context(self, n_tensors: int, *, graph_size: int = 0) -> Handle:
        """Return a context for ``n_tensors`` tensors and a graph, without data; freed with its last reference."""
        ffi, lib = self.ffi, self.lib
        size = (n_tensors + 1) * int(lib.ggml_tensor_overhead())
        if graph_size:
            size += int(lib.ggml_graph_overhead_custom(graph_size, False))
        made = lib.ggml_init(ffi.new("struct ggml_init_params *", {"mem_size": size, "no_alloc": True})[0])
        if made == ffi.NULL:
            raise DeviceUnavailableError(_KIND, f"{self.path.name} has no memory for {n_tensors} tensors' metadata")
        return ffi.gc(made, lib.ggml_free)

    def device_handles(self) -> list[Handle]:
        """Return the devices in the library's order."""
        return [self.lib.ggml_backend_dev_get(i) for i in range(self.lib.ggml_backend_dev_count())]

    # -- what this build is --------------------------------------------------

    def _refuse(self, why: str) -> DeviceUnavailableError:
        return DeviceUnavailableError(
            _KIND, f"{self.path} cannot be used: {why}", hint="ggml 0.9 to 0.26 are known to fit"
        )

    def _read_version(self) -> str:
        if not self.has("ggml_init") or not self.has("ggml_backend_dev_count"):
            raise self._refuse("it has no ggml_init, or no registry of devices")
        if not self.has("ggml_version"):
            raise self._refuse("it does not tell its version: it is older than 0.9")
        return self.text(self.lib.ggml_version())

    @property
    def version_tuple(self) -> tuple[int, ...]:
        """The version's numbers."""
        return tuple(int(n) for n in re.findall(r"\d+", self.version)[:3])

    def _take_log(self) -> None:
        """Send what the library logs to Python's logging, until the interpreter ends."""

        def write(level: int, text: Handle, _: Handle) -> None:
            _log.log(_LOG_LEVELS.get(level, logging.DEBUG), self.text(text).rstrip())

        self._callback = self.ffi.callback("void(int, const char *, void *)", write)
        self.lib.ggml_log_set(self._callback, self.ffi.NULL)
        atexit.register(self.lib.ggml_log_set, self.ffi.NULL, self.ffi.NULL)

    def _read_ops(self) -> dict[Op, int]:
        numbers: dict[str, int] = {}
        for i in range(_MAX_OPS):
            name = self.text(self.lib.ggml_op_name(i))
            numbers[name] = i
            if name == _LAST_OP:
                return {op: numbers[op.name] for op in Op if op.name in numbers}
        raise self._refuse(f"its list of ops has no {_LAST_OP}")

    def _read_types(self) -> frozenset[Type]:
        found = set()
        for type in Type:
            if type >= _FIRST_LATE_TYPE and self.version_tuple < _LATE_TYPES_SINCE:
                continue
            lib = self.lib
            if (
                self.text(lib.ggml_type_name(type)) == type.ggml_name
                and lib.ggml_blck_size(type) == type.block_size
                and lib.ggml_type_size(type) == type.type_size
            ):
                found.add(type)
        if not found >= {Type.F32, Type.F16, Type.I32}:
            raise self._refuse("its element types have other numbers")
        return frozenset(found)

    def _check_layout(self) -> None:
        """Compare the fields of tensors that the library made with what they must be."""
        ffi, lib = self.ffi, self.lib
        ctx = self.new_context(16)
        a = lib.ggml_new_tensor_4d(ctx, Type.F16, 8, 3, 5, 7)
        null = ffi.NULL
        facts = [a.type == Type.F16, list(a.ne) == [8, 3, 5, 7], list(a.nb) == [2, 16, 48, 240], a.op == 0]
        facts += [a.flags == 0, a.buffer == null, a.data == null, a.view_src == null, a.extra == null]
        facts += [all(s == null for s in a.src)]
        lib.ggml_set_name(a, b"probe")
        lib.ggml_set_output(a)
        facts += [self.text(a.name) == "probe", a.flags == 2]
        view = lib.ggml_view_2d(ctx, a, 4, 3, 16, 32)
        facts += [view.view_src == a, view.view_offs == 32, view.src[0] == a, view.op == self.ops[Op.VIEW]]
        x = lib.ggml_new_tensor_4d(ctx, Type.F32, 4, 2, 1, 1)
        scaled = lib.ggml_scale(ctx, x, 2.5)
        facts += [scaled.op == self.ops[Op.SCALE], ffi.cast("float *", scaled.op_params)[0] == 2.5]
        w = lib.ggml_new_tensor_4d(ctx, Type.F32, 4, 6, 3, 1)
        ids = lib.ggml_new_tensor_4d(ctx, Type.I32, 2, 5, 1, 1)
        b = lib.ggml_new_tensor_4d(ctx, Type.F32, 4, 2, 5, 1)
        product = lib.ggml_mul_mat_id(ctx, w, b, ids)
        facts += [product.op == self.ops[Op.MUL_MAT_ID], list(product.src)[:4] == [w, b, ids, null]]
        facts += [list(product.ne) == [6, 2, 5, 1]]
        if not all(facts):
            raise self._refuse(f"ggml {self.version} lays out its tensors in another way")

    def _read_sub_ops(self) -> dict[tuple[Op, int], int]:
        """Ask the library's builders for the first parameter words of UNARY and GLU."""
        lib = self.lib
        ctx = self.new_context(2 * (len(UnaryOp) + len(GluOp)) + 2)
        x = lib.ggml_new_tensor_4d(ctx, Type.F32, 4, 2, 1, 1)
        found: dict[tuple[Op, int], int] = {}
        for op, subs in ((Op.UNARY, UnaryOp), (Op.GLU, GluOp)):
            for sub in subs:
                name = f"ggml_{sub.name.lower()}"
                more = _TAKES_MORE.get(sub.name, ())
                self.ffi.cdef(f"struct ggml_tensor * {name}({', '.join(['void *', _TENSOR, *(t for t, _ in more)])});")
                if self.has(name):
                    values = [x if value is None else value for _, value in more]
                    found[op, int(sub)] = int(getattr(lib, name)(ctx, x, *values).op_params[0])
        return found

    def __repr__(self) -> str:
        return f"<Library ggml {self.version} from {self.path}>"


# -- finding one -----------------------------------------------------------------------

_loaded: dict[Path, Library] = {}


def _file_names() -> tuple[str, ...]:
    if sys.platform == "win32":
        return ("ggml.dll", "libggml.dll", "llama.dll")
    if sys.platform == "darwin":
        return ("libggml.dylib", "libllama.dylib")
    return ("libggml.so", "libllama.so")


def _in_folder(folder: Path) -> Path | None:
    for below in ("", "lib64", "lib", "bin"):
        for name in _file_names():
            if (folder / below / name).is_file():
                return folder / below / name
    return None


def find_library(given: str = "") -> Path:
    """Return the shared object to load.

    Parameters
    ----------
    given : str
        A file, or a folder with one in it; if empty, what ``PYGGML_LIBGGML`` says, else the installed package's.

    Raises
    ------
    DeviceUnavailableError
        There is none.
    """
    given = given or config.libggml_path()
    if given:
        path = Path(given).expanduser()
        found = _in_folder(path) if path.is_dir() else path
        if found is None or not found.exists():
            raise DeviceUnavailableError(
                _KIND, f"there is no ggml at {given}", hint=f"name a file such as {_file_names()[0]}, or its folder"
            )
        return found.resolve()
    spec = importlib.util.find_spec("libggml")
    if spec is not None and spec.origin is not None:
        found = _in_folder(Path(spec.origin).parent)
        if found is not None:
            return found.resolve()
    raise DeviceUnavailableError(
        _KIND,
        "no ggml library is installed",
        hint=f"{config.install_hint('libggml')}, or set PYGGML_LIBGGML to a build's libggml",
    )


def load_library(given: str = "") -> Library:
    """Return the library at a place (`find_library`), loaded once.

    Raises
    ------
    DeviceUnavailableError
        There is no library, it cannot be used, or an indistinguishable build is already loaded.
    """
    path = find_library(given)
    if path not in _loaded:
        library = Library(path)
        here = library.address(library.ffi.addressof(library.lib, "ggml_init"))
        for other in _loaded.values():
            if other.address(other.ffi.addressof(other.lib, "ggml_init")) == here:
                raise DeviceUnavailableError(
                    _KIND,
                    f"{path} would share its core with {other.path}, which this process has loaded",
                    hint="use one build of ggml in a process",
                )
        _loaded[path] = library
    return _loaded[path]
