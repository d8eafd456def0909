"""A small computation through a remote device, and conversations with real servers that were recorded of it.

`record` writes one: run as ``python tests/unit/backends/rpc_cases.py HOST PORT OUT.json.gz`` beside an rpc-server.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
import struct
import sys
import threading
from pathlib import Path

import numpy as np

import pyggml as ggml
from pyggml.backend import REGISTRY
from pyggml.backends.rpc.protocol import NO_ANSWER, Command
from pyggml.buffer import tensor_set
from pyggml.makers.quantize import quantize
from pyggml.types import Type

#: Names of copies hold the device's name, and with it the port.
_PORT = re.compile(rb"127\.0\.0\.1:\d+")


class Experts:
    """One MUL_MAT_ID over 4 experts and a norm of its result, the weight in some device's memory."""

    def __init__(self, where: ggml.Device, *, type: str = "q8_0", n_tokens: int = 6) -> None:
        rng = np.random.default_rng(1)
        self.weights = ggml.Context()
        self.up = self.weights.new_tensor(type, (256, 16, 4), name="blk.3.ffn_up_exps.weight")
        self.buffer = self.weights.alloc(where, usage="weights")
        packed = np.ascontiguousarray(quantize(rng.standard_normal((4, 16, 256), np.float32), Type.of(type)))
        tensor_set(self.up, packed.ctypes.data, 0, packed.nbytes)
        self.graph = ggml.Graph()
        with self.graph:
            self.x = self.graph.input("f32", (256, 1, n_tokens), name="x")
            self.ids = self.graph.input("i32", (2, n_tokens), name="ids")
            self.y = ggml.mul_mat_id(self.up, self.x, self.ids).named("y")
            self.normed = ggml.rms_norm(self.y, 1e-6).named("normed")
        self.graph.expand(self.normed)
        self.values = rng.standard_normal((n_tokens, 1, 256), np.float32)
        self.chosen = rng.integers(0, 4, (n_tokens, 2), np.int32)

    def fill(self, sched: ggml.Scheduler) -> None:
        """Allocate the graph and write its inputs."""
        sched.reset()
        sched.alloc_graph(self.graph)
        self.x.set_array(self.values)
        self.ids.set_array(self.chosen)

    def run(self, sched: ggml.Scheduler) -> np.ndarray:
        """Return the result."""
        self.fill(sched)
        sched.compute(self.graph)
        return self.normed.numpy()


def converse(device: ggml.Device) -> list[np.ndarray]:
    """Return results of a graph that is computed, computed again, and built anew for other values and more tokens."""
    remote, cpu = device.backend(), ggml.CPU(threads=1)
    sched = ggml.Scheduler([remote, cpu])
    experts = Experts(device)
    first = experts.run(sched)
    sched.compute(experts.graph)
    again = experts.normed.numpy()
    larger = Experts(device, n_tokens=9)
    return [first, again, larger.run(sched)]


class Recorded:
    """A server that says what a real one said, as long as it is asked the same, byte by byte."""

    def __init__(self, path: Path) -> None:
        self.turns = [
            (Command[name], base64.b64decode(asked), base64.b64decode(said))
            for name, asked, said in json.loads(gzip.decompress(path.read_bytes()))
        ]
        self.n_served = 0
        self.differs = ""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host, self.port = self._listener.getsockname()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        peer, _ = self._listener.accept()
        with peer:
            peer.settimeout(30)
            for command, asked, said in self.turns:
                got = _take(peer, len(asked)) if asked else b""
                if _PORT.sub(b"", got) != _PORT.sub(b"", asked):
                    self.differs = f"{command.name}, turn {self.n_served}: {len(asked):,} bytes were asked otherwise"
                    return
                self.n_served += 1
                peer.sendall(said)

    def close(self) -> None:
        """Wait until the conversation is over."""
        self._thread.join()
        self._listener.close()


def _take(peer: socket.socket, n: int) -> bytes:
    out = b""
    while len(out) < n:
        part = peer.recv(n - len(out))
        if not part:
            break
        out += part
    return out


def record(host: str, port: int, out: Path) -> None:
    """Hold the conversation with a real server, and write down what both sides said."""
    listener = socket.create_server(("127.0.0.1", 0))
    turns: list[tuple[str, str, str]] = []

    def relay() -> None:
        peer, _ = listener.accept()
        server = socket.create_connection((host, port))
        while header := _take(peer, 9):
            command, size = struct.unpack("<BQ", header)
            asked = header + _take(peer, size)
            server.sendall(asked)
            said = b""
            if Command(command) not in NO_ANSWER:
                said = _take(server, 8)
                said += _take(server, struct.unpack("<Q", said)[0])
                peer.sendall(said)
            turns.append((Command(command).name, base64.b64encode(asked).decode(), base64.b64encode(said).decode()))

    threading.Thread(target=relay, daemon=True).start()
    converse(REGISTRY.open(f"rpc:127.0.0.1:{listener.getsockname()[1]}"))
    out.write_bytes(gzip.compress(json.dumps(turns).encode(), mtime=0))


if __name__ == "__main__":
    record(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
