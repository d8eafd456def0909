"""Only the used experts of a model reach the device: byte for byte as llama.cpp copies them, and not one too few."""

from __future__ import annotations

import ctypes
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from recorded_models import write_recorded_model

from pyggml.backends.sim import SimBackend
from pyggml.errors import ComputeError, SchedError
from pyggml.graph import GraphView
from pyggml.record import CopyRecord, Recording
from pyggml.sched.policies import FullCopier, UsedExpertCopier
from pyggml.session import ContextFlags, PlacementFlags, Session
from pyggml.types import Op, Type

DATA = Path(__file__).parents[1] / "data" / "copies"
SIM = "sim:rtx4090-pcie4"
TOKENS = [(i * 53 + 32) % 259 for i in range(40)]


def session(path: Path, **options) -> Session:
    """Return a session over [sim, cpu] with experts in host memory; every op with weights there is offloaded."""
    context = ContextFlags(n_ctx=512, n_batch=64, n_ubatch=64, type_k=Type.F32, type_v=Type.F32, flash_attn="off")
    rule = {"offload_rule": lambda backend, op: op.op is not Op.GET_ROWS}
    return Session.open(
        path, **({"devices": [SIM], "placement": PlacementFlags(cpu_moe=True), "context": context} | rule | options)
    )


@pytest.mark.parametrize("batch", [24, 8, 1, 3])
@pytest.mark.parametrize(("arch", "type"), [("qwen3moe", "Q8_0"), ("gpt-oss", "MXFP4")])
def test_copies_are_those_of_llama_cpp(arch, type, batch, tmp_path):
    """Tensor, offset and size of every copy of experts, biases too, in order, as recorded off the wire."""
    data = json.loads(gzip.decompress((DATA / f"{arch}-{type}-used-experts-1.json.gz").read_bytes()))
    recording = Recording()
    path = write_recorded_model(arch, tmp_path / "m.gguf", type)
    tokens = data["tokens"]
    with session(path, recorder=recording, strict=True) as s:
        for i in range(0, len(tokens), batch):
            s.decode(tokens[i : i + batch], outputs="all")
    found = [
        [r.tensor, r.offset_bytes, r.size_bytes]
        for r in recording.records
        if isinstance(r, CopyRecord) and "_exps." in r.tensor
    ]
    assert found == data["copies"][str(batch)]


@pytest.mark.parametrize("n_tokens", [1, 3, 40])
def test_used_experts_give_what_whole_copies_give(llama, n_tokens):
    """Logits are bit for bit those of whole copies, for fewer bytes where few experts are used."""
    with session(llama) as s, session(llama, policy=FullCopier()) as whole:
        np.testing.assert_array_equal(s.decode(TOKENS[:n_tokens]), whole.decode(TOKENS[:n_tokens]))
        assert whole.sched.stats.bytes_copied == whole.sched.stats.bytes_full
        assert s.sched.stats.bytes_full == whole.sched.stats.bytes_full
        if n_tokens == 1:
            assert s.sched.stats.bytes_copied < 0.3 * s.sched.stats.bytes_full


def test_bytes_reported_are_those_that_arrived(llama):
    """The scheduler's count equals what the device's own memory saw come in, but for inputs set from outside."""
    with session(llama) as s:
        device = s.backends[0].device
        s.decode(TOKENS[:3])
        for n in (1, 3, 20):
            seen, told = device.traffic.bytes_in, s.sched.stats.bytes_copied
            s.decode(TOKENS[:n])
            assert device.traffic.bytes_in - seen == s.sched.stats.bytes_copied - told


class _Forgetful(UsedExpertCopier):
    """Leaves one used expert of the first weight out: its place is fresh memory."""

    def copy(self, transfer):
        if transfer.source.name != "blk.0.ffn_gate_exps.weight" or transfer.kind != "experts":
            return super().copy(transfer)
        transfer.send_experts(transfer.ids() - {max(transfer.ids())})
        return True


def test_an_expert_that_was_not_copied_shows(llama, monkeypatch):
    """Without one used expert of one layer the logits are NaN, as fresh device memory is, and an error. PYGGML_CHECK=1 names the expert before."""
    monkeypatch.setenv("PYGGML_CHECK", "0")
    with session(llama, policy=_Forgetful()) as s, pytest.raises(ComputeError, match="the logits contain"):
        s.decode(TOKENS[:1])
    monkeypatch.setenv("PYGGML_CHECK", "1")
    with session(llama, policy=_Forgetful()) as s, pytest.raises(SchedError, match=r"\(layer 0\) .* lacks expert \d+ "):
        s.decode(TOKENS[:1])
    with session(llama) as s:
        assert not np.isnan(s.decode(TOKENS[:1])).any()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mprotect"), reason="memory cannot be protected here")
def test_device_splits_run_with_host_weights_unreadable(llama, monkeypatch):
    """While a device split runs, neither the mapped weights nor the host's compute buffer can be read."""
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    compute, n_guarded = SimBackend.graph_compute, 0
    with session(llama) as plain:
        expected = plain.decode(TOKENS)
    with session(llama) as s:
        pages = []
        for buffer in [b for b in s.loaded.buffers if b.is_host] + s.sched.galloc.chunks(1):
            first, last = -(-buffer.base // 4096) * 4096, (buffer.base + buffer.size) // 4096 * 4096
            pages.append((first, last - first, 1 if buffer in s.loaded.buffers else 3))
        assert len(pages) == 2

        def guarded(self: SimBackend, view: GraphView) -> None:
            nonlocal n_guarded
            for first, size, _ in pages:
                assert protect(first, size, 0) == 0
            try:
                compute(self, view)
                self.synchronize()
            finally:
                for first, size, access in pages:
                    protect(first, size, access)
            n_guarded += 1

        monkeypatch.setattr(SimBackend, "graph_compute", guarded)
        np.testing.assert_array_equal(s.decode(TOKENS), expected)
    assert n_guarded > 3
