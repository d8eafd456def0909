"""What llama.cpp's own ``--fit`` chooses, by its `common_fit_params`; in the child.

The devices are those of captures: they have the memory of the planned cards, and compute nothing.
"""

from __future__ import annotations

from typing import Any

from .capture import CaptureFailed, Host
from .capturing import Watcher
from .params import context_params, model_params

__all__ = ["fit"]

Message = dict[str, Any]  # what goes through JSON


class _Failures(Watcher):
    """Keeps the first exception of a device's functions."""

    error: BaseException | None = None

    def failed(self, error: BaseException) -> None:
        """Keep an exception."""
        self.error = self.error or error


def fit(host: Host, request: Message) -> Message:
    """Return the flags that `common_fit_params` leaves.

    Parameters
    ----------
    request : dict
        ``model``, ``placement``, ``context``, ``margin`` in bytes of each device, and ``n_ctx_min``.

    Raises
    ------
    CaptureFailed
        llama.cpp does not load the model.
    """
    library, ffi, lib = host.library, host.library.ffi, host.library.lib
    watcher, placement = _Failures(), request["placement"]
    host.cpu.watcher = watcher
    n_tried = 0

    def count(line: str) -> None:
        nonlocal n_tried
        n_tried += line.startswith("llama_context: n_ctx ")

    library.on_line = count
    devices = [host.device(about, watcher) for about in placement["devices"]]
    for device in devices:  # a card copies beside its work: several of them take turns, with more compute memory
        device.is_async = device.has_events = True
    bufts = {d.name: d.buft for d in devices} | {"CPU": lib.ggml_backend_cpu_buffer_type()}
    model, kept = model_params(library, placement, [d.handle for d in devices], bufts)
    context = context_params(library, request["context"])
    n = max(lib.llama_max_devices(), len(devices), 1)
    shares = ffi.new("float[]", n)
    overrides = ffi.new("struct llama_model_tensor_buft_override[]", lib.llama_max_tensor_buft_overrides())
    margins = ffi.new("size_t[]", [request["margin"]] * n)
    try:
        status = library.fit(
            request["model"],
            ffi.addressof(model),
            ffi.addressof(context),
            shares,
            overrides,
            margins,
            request["n_ctx_min"],
        )
    finally:
        host.leave()
    del kept
    if watcher.error is not None:
        raise watcher.error
    if status > 1:
        raise CaptureFailed("llama.cpp's --fit does not load the model")
    chosen: list[list[str]] = []
    if model.tensor_buft_overrides == overrides:
        for row in overrides:
            if row.pattern == ffi.NULL:
                break
            chosen.append([library.text(row.pattern), library.text(lib.ggml_backend_buft_name(row.buft))])
    return {
        "fits": status == 0,
        "n_gpu_layers": model.n_gpu_layers,
        "tensor_split": [shares[i] for i in range(len(devices))] if model.tensor_split == shares else [],
        "overrides": chosen,
        "n_ctx": context.n_ctx,
        "n_tried": n_tried,
        "build": library.build or library.version,
    }
