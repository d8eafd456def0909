"""A whole model over a remote device: layers there, experts here, and a server that dies while it generates."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pyggml.backends.rpc.protocol import Command
from pyggml.cli import run
from pyggml.errors import RPCError
from pyggml.session import ContextFlags, PlacementFlags, Session
from pyggml.testing.rpc_server import Fault, RPCServer

TOKENS = [(i * 53 + 32) % 259 for i in range(12)]
CONTEXT = ContextFlags(n_ctx=64)


def logits(model, **options) -> np.ndarray:
    """Return the logits of a prompt and of two tokens after it."""
    with Session.open(model, context=CONTEXT, **options) as session:
        return np.concatenate([session.decode(TOKENS, outputs="all"), session.decode([5]), session.decode([9])])


@pytest.mark.parametrize("version", [(7, 0, 0), (8, 0, 0)], ids=["7.0", "8.0"])
def test_a_model_over_a_remote_device(recorded_models, version):
    """Whole or with its experts on the host, the model's logits are those of the host alone."""
    model = recorded_models["qwen3moe"]
    want = logits(model)
    with RPCServer(version=version) as server:
        np.testing.assert_allclose(logits(model, devices=[server.address]), want, atol=2e-4)
        experts_here = PlacementFlags(cpu_moe=True)
        np.testing.assert_allclose(logits(model, devices=[server.address], placement=experts_here), want, atol=2e-4)
        assert server.counts[Command.GRAPH_RECOMPUTE] > 0
        assert server.refused == []


def test_a_session_can_be_opened_anew_after_its_server_was_lost(recorded_models):
    """The token at which the server dies is an error of ours; with the server back, a new session answers as before."""
    model = recorded_models["qwen3moe"]
    with RPCServer() as server:
        with Session.open(model, devices=[server.address], context=CONTEXT) as session:
            session.decode(TOKENS)
            server.fault = Fault(Command.SET_TENSOR, "close")
            with pytest.raises(RPCError) as caught:
                session.decode([5])
            assert caught.value.port == server.port
        server.fault = None
        np.testing.assert_allclose(logits(model, devices=[server.address]), logits(model), atol=2e-4)


def test_the_run_command_takes_it(recorded_models, capsys):
    """`pyggml run --device rpc:HOST:PORT` works; without a server it is one clear line and status 1."""
    words = ["run", str(recorded_models["qwen3moe"]), "--tokens", "1,2,3,4", "-n", "2", "--json", "--device"]
    with RPCServer() as server:
        assert run([*words, f"{server.address},cpu"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert [d["name"] for d in report["devices"]] == [server.address, "CPU"]
    assert run([*words, f"{server.address},cpu"]) == 1
    assert f"{server.address}: HELLO: cannot connect" in capsys.readouterr().err
