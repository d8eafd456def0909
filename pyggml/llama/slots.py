"""Finds the layout of ggml's backend interfaces in a build by calling it, without headers.

The interfaces are tables of function pointers in ggml's objects, and they grow from version to version. To probe them,
a block of words is made, each the address of its own small function, and passed as the object to a public function of
ggml. The function that is called shows the slot; a returned word shows a field.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..backends.libggml.library import Handle, Library
from ..errors import DeviceUnavailableError

__all__ = ["FUNCTIONS", "N_WORDS", "Interfaces", "Table", "find_interfaces"]

#: Words of a block; the largest object of any version has 22.
N_WORDS = 40
#: Result of a slot's function: an aligned address that is not in use.
_NOWHERE = 1 << 20

#: Functions that are called here but not declared by `Library`.
FUNCTIONS = """
void * ggml_backend_buft_get_device(void * buft);
void ggml_backend_tensor_memset(struct ggml_tensor * tensor, uint8_t value, size_t offset, size_t size);
void * ggml_backend_guid(void * backend);
const char * ggml_backend_name(void * backend);
void * ggml_backend_get_device(void * backend);
void ggml_backend_dev_get_props(void * device, void * props);
void * ggml_backend_dev_by_type(int type);
const char * ggml_backend_reg_name(void * reg);
size_t ggml_backend_reg_dev_count(void * reg);
void * ggml_backend_reg_dev_get(void * reg, size_t index);
void * ggml_backend_dev_buffer_from_host_ptr(void * device, void * ptr, size_t size, size_t max_tensor_size);
bool ggml_backend_buffer_copy_tensor(const struct ggml_tensor * src, struct ggml_tensor * dst);
void * ggml_backend_cpu_buffer_type(void);
void * ggml_backend_sched_new(void * backends, void * bufts, int n, size_t graph_size, bool parallel, bool op_offload);
bool ggml_backend_sched_alloc_graph(void * sched, void * graph);
void ggml_backend_sched_free(void * sched);
"""


@dataclass(frozen=True, slots=True)
class Table:
    """The layout of one kind of object, in words from its start.

    Attributes
    ----------
    slots : dict of str to int
        Functions by upstream's names.
    fields : dict of str to int
        Values that public functions return.
    """

    slots: dict[str, int] = field(default_factory=dict)
    fields: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Interfaces:
    """The layout of each kind of object that a device in Python makes or changes.

    Attributes
    ----------
    api_version : int
        `GGML_BACKEND_API_VERSION` of the build, which a registry must state.
    """

    buffer_type: Table
    buffer: Table
    backend: Table
    device: Table
    registry: Table
    api_version: int


#: Slots and fields that a device in Python needs of each kind of object.
_NEEDED = {
    "buffer_type": "get_name alloc_buffer get_alignment get_alloc_size is_host .device",
    "buffer": "free_buffer get_base set_tensor get_tensor memset_tensor clear .buft",
    "backend": "get_name free set_tensor_async get_tensor_async cpy_tensor_async synchronize graph_compute "
    "graph_optimize event_record event_wait .guid .device",
    "device": "get_name get_description get_memory get_type get_props init_backend get_buffer_type get_host_buffer_type "
    "buffer_from_host_ptr supports_op supports_buft offload_op event_new event_free event_synchronize .reg",
    "registry": "get_name get_device_count get_device",
}


class _Prober:
    """Makes blocks of words, and finds which of their functions is called."""

    def __init__(self, library: Library) -> None:
        self.ffi = library.ffi
        self.called: list[int] = []
        self.answer = _NOWHERE
        signature = f"intptr_t({', '.join(['intptr_t'] * 6)})"
        self._functions = [self.ffi.callback(signature, self._function(i)) for i in range(N_WORDS)]
        self.words = [int(self.ffi.cast("intptr_t", f)) for f in self._functions]
        self._blocks: list[Handle] = []

    def _function(self, i: int) -> Callable[..., int]:
        def called(*_: int) -> int:
            self.called.append(i)
            return self.answer

        return called

    def block(self) -> Handle:
        """Return an object in which every word is a different function."""
        made = self.ffi.new("intptr_t[]", self.words)
        self._blocks.append(made)
        return self.ffi.cast("void *", made)

    def ask(self, table: Table, name: str, call: Callable[[], Any], *, answer: int = _NOWHERE) -> None:
        """Record the slot that a call reaches, or the field that it returns."""
        self.called.clear()
        self.answer = answer
        returned = call()
        if self.called:
            table.slots[name] = self.called[0]
            return
        try:
            value = int(self.ffi.cast("intptr_t", returned))
        except TypeError:  # a function without a result
            return
        if value in self.words:
            table.fields[name] = self.words.index(value)


def find_interfaces(library: Library) -> Interfaces:
    """Return the layout of a build's interfaces.

    Raises
    ------
    DeviceUnavailableError
        A required function was not found.
    """
    ffi, lib, probe = library.ffi, library.lib, _Prober(library)
    null = ffi.NULL
    context = library.new_context(8, graph_size=16)
    x, y = (lib.ggml_new_tensor_4d(context, 0, 8, 1, 1, 1) for _ in range(2))
    graph = lib.ggml_new_graph_custom(context, 16, False)
    scratch, sizes = ffi.new("char[512]"), ffi.new("size_t[2]")

    buft, of_buft = probe.block(), Table()
    for name, call in {
        "get_name": lambda: lib.ggml_backend_buft_name(buft),
        "alloc_buffer": lambda: lib.ggml_backend_buft_alloc_buffer(buft, 64),
        "get_alignment": lambda: lib.ggml_backend_buft_get_alignment(buft),
        "get_alloc_size": lambda: lib.ggml_backend_buft_get_alloc_size(buft, y),
        "is_host": lambda: lib.ggml_backend_buft_is_host(buft),
        "device": lambda: lib.ggml_backend_buft_get_device(buft),
    }.items():
        probe.ask(of_buft, name, call)

    buffer, of_buffer = probe.block(), Table()
    probe.ask(of_buffer, "buft", lambda: lib.ggml_backend_buffer_get_type(buffer))
    if "buft" in of_buffer.fields:  # functions of a buffer also call its type
        ffi.cast("intptr_t *", buffer)[of_buffer.fields["buft"]] = int(ffi.cast("intptr_t", buft))
    x.buffer = buffer
    x.data = ffi.cast("void *", _NOWHERE)
    for name, call in {
        "get_base": lambda: lib.ggml_backend_buffer_get_base(buffer),
        "clear": lambda: lib.ggml_backend_buffer_clear(buffer, 0),
        "set_tensor": lambda: lib.ggml_backend_tensor_set(x, scratch, 0, 4),
        "get_tensor": lambda: lib.ggml_backend_tensor_get(x, scratch, 0, 4),
        "memset_tensor": lambda: lib.ggml_backend_tensor_memset(x, 0, 0, 4),
    }.items():
        probe.ask(of_buffer, name, call)
    y.buffer, y.data = x.buffer, x.data
    if library.has("ggml_backend_buffer_copy_tensor"):
        probe.ask(of_buffer, "cpy_tensor", lambda: lib.ggml_backend_buffer_copy_tensor(x, y))
    _find_free_buffer(library, probe, of_buffer)

    backend, of_backend = probe.block(), Table()
    source, event = probe.block(), ffi.new("void *[2]")
    for name, call in {
        "guid": lambda: lib.ggml_backend_guid(backend),
        "device": lambda: lib.ggml_backend_get_device(backend),
        "get_name": lambda: lib.ggml_backend_name(backend),
        "free": lambda: lib.ggml_backend_free(backend),
        "graph_compute": lambda: lib.ggml_backend_graph_compute_async(backend, graph),
        "set_tensor_async": lambda: lib.ggml_backend_tensor_set_async(backend, x, scratch, 0, 4),
        "get_tensor_async": lambda: lib.ggml_backend_tensor_get_async(backend, x, scratch, 0, 4),
        "cpy_tensor_async": lambda: lib.ggml_backend_tensor_copy_async(source, backend, x, y),
        "synchronize": lambda: lib.ggml_backend_synchronize(backend),
        "event_record": lambda: lib.ggml_backend_event_record(event, backend),
        "event_wait": lambda: lib.ggml_backend_event_wait(backend, event),
    }.items():
        # a refused copy would be made in another way, of which debug builds print the names
        probe.ask(of_backend, name, call, answer=1 if name == "cpy_tensor_async" else _NOWHERE)

    device, of_device = probe.block(), Table()
    event[0] = device
    for name, call in {
        "reg": lambda: lib.ggml_backend_dev_backend_reg(device),
        "get_name": lambda: lib.ggml_backend_dev_name(device),
        "get_description": lambda: lib.ggml_backend_dev_description(device),
        "get_memory": lambda: lib.ggml_backend_dev_memory(device, sizes, sizes + 1),
        "get_type": lambda: lib.ggml_backend_dev_type(device),
        "get_props": lambda: lib.ggml_backend_dev_get_props(device, scratch),
        "init_backend": lambda: lib.ggml_backend_dev_init(device, null),
        "get_buffer_type": lambda: lib.ggml_backend_dev_buffer_type(device),
        "get_host_buffer_type": lambda: lib.ggml_backend_dev_host_buffer_type(device),
        "buffer_from_host_ptr": lambda: lib.ggml_backend_dev_buffer_from_host_ptr(device, scratch, 64, 64),
        "event_new": lambda: lib.ggml_backend_event_new(device),
        "event_free": lambda: lib.ggml_backend_event_free(event),
        "event_synchronize": lambda: lib.ggml_backend_event_synchronize(event),
        "supports_op": lambda: lib.ggml_backend_dev_supports_op(device, y),
        "supports_buft": lambda: lib.ggml_backend_dev_supports_buft(device, buft),
        "offload_op": lambda: lib.ggml_backend_dev_offload_op(device, y),
    }.items():
        probe.ask(of_device, name, call)

    registry, of_registry = probe.block(), Table()
    for name, call in {
        "get_name": lambda: lib.ggml_backend_reg_name(registry),
        "get_device_count": lambda: lib.ggml_backend_reg_dev_count(registry),
        "get_device": lambda: lib.ggml_backend_reg_dev_get(registry, 0),
    }.items():
        probe.ask(of_registry, name, call)

    _find_graph_optimize(library, probe, of_backend)

    cpu = lib.ggml_backend_dev_by_type(0)
    api_version = ffi.cast("int *", lib.ggml_backend_dev_backend_reg(cpu))[0]
    found = Interfaces(of_buft, of_buffer, of_backend, of_device, of_registry, api_version)
    _check(library, found)
    return found


def _find_free_buffer(library: Library, probe: _Prober, table: Table) -> None:
    """Find the function that frees a buffer, with a real buffer because the library deletes the object."""
    ffi, lib = library.ffi, library.lib
    real = lib.ggml_backend_buft_alloc_buffer(lib.ggml_backend_cpu_buffer_type(), 64)
    words = ffi.cast("intptr_t *", real)
    for i in range(table.fields["buft"]):  # its 64 bytes are never freed
        words[i] = probe.words[i]
    probe.ask(table, "free_buffer", lambda: lib.ggml_backend_buffer_free(real))


def _find_graph_optimize(library: Library, probe: _Prober, table: Table) -> None:
    """Find the function that gets the graph of each split, among those that a CPU stream does not have, with a scheduler."""
    ffi, lib, null = library.ffi, library.lib, library.ffi.NULL
    cpu = lib.ggml_backend_dev_init(lib.ggml_backend_dev_by_type(0), null)
    words = ffi.cast("intptr_t *", cpu)
    for i in range(1, table.fields["device"]):
        if not words[i] and i not in table.slots.values():
            words[i] = probe.words[i]
    context = library.new_context(8, graph_size=16)
    graph = lib.ggml_new_graph_custom(context, 16, False)
    lib.ggml_build_forward_expand(graph, lib.ggml_scale(context, lib.ggml_new_tensor_4d(context, 0, 8, 1, 1, 1), 2.0))
    sched = lib.ggml_backend_sched_new(ffi.new("void *[]", [cpu]), null, 1, 16, False, False)
    probe.ask(table, "graph_optimize", lambda: lib.ggml_backend_sched_alloc_graph(sched, graph))
    lib.ggml_backend_sched_free(sched)
    lib.ggml_backend_free(cpu)


def _check(library: Library, found: Interfaces) -> None:
    missing = []
    for kind, names in _NEEDED.items():
        table: Table = getattr(found, kind)
        for name in names.split():
            known = table.fields if name.startswith(".") else table.slots
            if name.removeprefix(".") not in known:
                missing.append(f"{kind}.{name.removeprefix('.')}")
    if missing:
        raise DeviceUnavailableError(
            "llama",
            f"{library.path}: the slots of {', '.join(missing)} were not found in ggml {library.version}",
            hint="use another build of llama.cpp",
        )
