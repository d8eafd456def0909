"""Where weights go: layers, overrides, and what devices can use."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tiny

from pyggml.backend import REGISTRY, Device
from pyggml.backends.mock import MockDevice
from pyggml.errors import GraphError, UnsupportedOpError
from pyggml.models.architectures import weight_specs
from pyggml.models.placement import Placement, PlacementFlags, place
from pyggml.models.weights import resolve_specs
from pyggml.types import Op, Type


def device(name: str) -> MockDevice:
    """Return a device for plans."""
    opened = REGISTRY.open(f"mock:{name}")
    assert isinstance(opened, MockDevice)
    return opened


def placed(flags: PlacementFlags, names: tuple[str, ...] = ("CUDA0",), arch: str = "llama") -> Placement:
    """Return the placement of a tiny model over devices and the CPU."""
    return placed_on(flags, [device(n) for n in names], arch)


def placed_on(flags: PlacementFlags, devices: Sequence[Device], arch: str = "llama") -> Placement:
    """Return the placement of a tiny model over open devices and the CPU."""
    hp = tiny.hparams(arch)
    infos = tiny.infos(hp)
    specs = resolve_specs(weight_specs(hp, infos), infos, "tiny.gguf")
    return place(hp, specs, infos, devices, REGISTRY.open("cpu"), flags)


def where(p: Placement) -> dict[str, str]:
    """Return the name of the buffer type of each weight."""
    return {w.spec.name: w.buft.name for w in p.weights}


def test_all_layers_go_to_the_device_but_the_embedding():
    """Without -ngl everything but the input embedding is on the device."""
    by_name = where(placed(PlacementFlags()))
    assert by_name.pop("token_embd.weight") == "CPU"
    assert set(by_name.values()) == {"CUDA0"}


def test_the_output_counts_as_a_layer():
    """-ngl 2 of 3 layers and the output puts the last layer and the output on the device."""
    p = placed(PlacementFlags(n_gpu_layers=2))
    assert [d.name for d in p.layers] == ["CPU", "CPU", "CUDA0"]
    assert p.output.name == "CUDA0"
    assert where(p)["blk.1.attn_q.weight"] == "CPU"
    assert where(p)["blk.2.attn_q.weight"] == "CUDA0"
    assert not p.is_full_offload


@pytest.mark.parametrize(("ngl", "expected"), [(0, 0), (1, 1), (4, 4), (99, 4)])
def test_counts_of_layers(ngl, expected):
    """-ngl N puts min(N, layers + 1) of them on the device."""
    p = placed(PlacementFlags(n_gpu_layers=ngl))
    assert sum(d.name == "CUDA0" for d in (*p.layers, p.output)) == expected


def test_cpu_moe_keeps_experts_on_the_cpu():
    """--cpu-moe moves the three expert weights of each layer, not the router."""
    by_name = where(placed(PlacementFlags(cpu_moe=True)))
    assert {n for n, b in by_name.items() if b == "CPU"} == {"token_embd.weight"} | {
        f"blk.{i}.ffn_{k}_exps.weight" for i in range(3) for k in ("gate", "up", "down")
    }


def test_cpu_moe_moves_nothing_but_experts():
    """A shared expert, the router and its bias stay on the device; a dense first layer has nothing that moves."""
    by_name = where(placed(PlacementFlags(cpu_moe=True), arch="glm4moe"))
    assert {n for n, b in by_name.items() if b == "CPU"} == {"token_embd.weight"} | {
        f"blk.{i}.ffn_{k}_exps.weight" for i in (1, 2) for k in ("gate", "up", "down")
    }
    stay = ("ffn_up_shexp.weight", "ffn_gate_inp.weight", "exp_probs_b.bias")
    assert {by_name[f"blk.1.{name}"] for name in stay} == {"CUDA0"}


def test_cpu_moe_moves_biases_of_experts():
    """The biases of gpt-oss's experts go where their weights go; that of its router stays."""
    by_name = where(placed(PlacementFlags(cpu_moe=True), arch="gpt-oss"))
    biases = {f"blk.{i}.ffn_{k}_exps.bias" for i in range(3) for k in ("gate", "up", "down")}
    assert {n for n, b in by_name.items() if b == "CPU" and n.endswith(".bias")} == biases
    assert by_name["blk.0.ffn_gate_inp.bias"] == "CUDA0"


def test_n_cpu_moe_counts_dense_layers():
    """--n-cpu-moe 2 of a model whose first layer is dense moves the experts of the second layer alone."""
    by_name = where(placed(PlacementFlags(n_cpu_moe=2), arch="glm4moe"))
    assert {n.split(".")[1] for n, b in by_name.items() if b == "CPU" and n.startswith("blk.")} == {"1"}
    assert by_name["blk.2.ffn_up_exps.weight"] == "CUDA0"


def test_n_cpu_moe_keeps_the_first_layers_experts():
    """--n-cpu-moe 1 moves the experts of layer 0."""
    by_name = where(placed(PlacementFlags(n_cpu_moe=1)))
    assert by_name["blk.0.ffn_up_exps.weight"] == "CPU"
    assert by_name["blk.1.ffn_up_exps.weight"] == "CUDA0"


def test_the_first_override_that_matches_holds():
    """-ot is searched in order, commas separate, and comes before --cpu-moe."""
    p = placed(PlacementFlags(overrides=(r"blk\.0\.ffn_up_exps=CUDA0,attn_q=CPU",), cpu_moe=True))
    by_name = where(p)
    assert by_name["blk.0.ffn_up_exps.weight"] == "CUDA0"
    assert by_name["blk.0.ffn_gate_exps.weight"] == "CPU"
    assert by_name["blk.2.attn_q.weight"] == "CPU"
    reasons = {w.spec.name: w.reason for w in p.weights}
    assert reasons["blk.2.attn_q.weight"] == "-ot attn_q=CPU"
    assert reasons["blk.0.ffn_gate_exps.weight"] == "--cpu-moe"
    assert p.has_overrides


@pytest.mark.parametrize(
    ("name", "is_put"),
    [("CUDA1", "SIM2"), ("ROCm0", "SIM1"), ("Vulkan1", "SIM1"), ("CUDA2", "SIM2"), ("SIM0", "SIM0"), ("CPU", "CPU")],
)
def test_llama_cpps_names_are_simulated_devices(name: str, is_put: str) -> None:
    """A backend of llama.cpp counts its own cards; another backend counts all. So a plan's command can be pasted."""
    cards = REGISTRY.open_all(["rtx3090", "mi50", "rtx3060", "cpu"], data=False)[:-1]
    by_name = where(placed_on(PlacementFlags(overrides=(rf"blk\.0\.ffn_up_exps={name}",)), cards))
    assert by_name["blk.0.ffn_up_exps.weight"] == is_put


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("exps", "REGEX=BUFT"),
        ("exps=CUDA7", "there are CUDA0, CPU"),
        ("(exps=CPU", "not a regular expression"),
        ("=CPU", "REGEX=BUFT"),
    ],
)
def test_a_wrong_override_is_refused(override, says):
    """Errors of -ot name the text and what would do."""
    with pytest.raises(GraphError, match=says) as caught:
        placed(PlacementFlags(overrides=(override,)))
    assert override.partition("=")[0] in str(caught.value)


def test_layers_are_shared_by_tensor_split():
    """-ts 1,3 gives the second of two devices three quarters of the layers."""
    p = placed(PlacementFlags(tensor_split=(1.0, 3.0)), ("CUDA0", "CUDA1"))
    assert [d.name for d in (*p.layers, p.output)] == ["CUDA0", "CUDA1", "CUDA1", "CUDA1"]


def test_more_shares_than_devices_are_refused():
    """-ts needs at most one share for each device."""
    with pytest.raises(GraphError, match="CUDA0"):
        placed(PlacementFlags(tensor_split=(1.0, 1.0)))


def test_a_weight_that_the_device_cannot_use_goes_to_the_next_type(monkeypatch):
    """A device without MUL_MAT for a type leaves such weights on the CPU, with the reason."""
    monkeypatch.setattr(MockDevice, "supports_op", lambda self, op: op.op is not Op.MUL_MAT_ID)
    p = placed(PlacementFlags())
    assert where(p)["blk.0.ffn_up_exps.weight"] == "CPU"
    reason = next(w.reason for w in p.weights if w.spec.name == "blk.0.ffn_up_exps.weight")
    assert reason == "layer 0 is on CUDA0, which cannot use a f32 weight for MUL_MAT_ID in CUDA0"


def test_a_type_that_nobody_can_use_is_refused():
    """A weight of a type without kernels is an error that names the tensor and the type."""
    hp = tiny.hparams("llama")
    infos = tiny.infos(hp, Type.Q8_K)
    specs = resolve_specs(weight_specs(hp, infos), infos, "tiny.gguf")
    with pytest.raises(UnsupportedOpError, match=r"token_embd\.weight.*q8_K"):
        place(hp, specs, infos, [], REGISTRY.open("cpu"), PlacementFlags())


def test_a_head_that_is_the_embedding_is_placed_twice():
    """Without an output weight the embedding is both, on the CPU and on the output's device."""
    hp = tiny.hparams("llama")
    infos = tiny.infos(hp)
    del infos["output.weight"]
    specs = resolve_specs(weight_specs(hp, infos), infos, "tiny.gguf")
    p = place(hp, specs, infos, [device("CUDA0")], REGISTRY.open("cpu"), PlacementFlags())
    uses = [(w.spec.part, w.buft.name) for w in p.weights if w.spec.name == "token_embd.weight"]
    assert uses == [("input", "CPU"), ("output", "CUDA0")]


UP0, UP1, UP2 = (f"blk.{i}.ffn_up_exps.weight" for i in range(3))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("exps=CUDA0", "--cpu-moe"), ("CUDA0", "CUDA0", "CUDA0")),
        (("--cpu-moe", "exps=CUDA0"), ("CPU", "CPU", "CPU")),
        (("--n-cpu-moe 2", "exps=CUDA0"), ("CPU", "CPU", "CUDA0")),
        (("exps=CUDA0", "--n-cpu-moe 2"), ("CUDA0", "CUDA0", "CUDA0")),
        (("--n-cpu-moe 1", r"blk\.1\.ffn_.*_exps=CPU", "exps=CUDA0"), ("CPU", "CPU", "CUDA0")),
        ((r"blk\.0\.ffn_up=CUDA0,ffn_gate=CUDA0", "--n-cpu-moe 99"), ("CUDA0", "CPU", "CPU")),
        (("--n-cpu-ffn 3", "--n-cpu-moe 1"), ("CPU", "CUDA0", "CUDA0")),
        (("--n-cpu-moe 999999999999",), ("CPU", "CPU", "CPU")),
    ],
)
def test_overrides_hold_in_the_order_of_the_command_line(overrides, expected):
    """-ot, --cpu-moe, --n-cpu-moe and --n-cpu-ffn are one list: the first that matches a weight decides."""
    by_name = where(placed(PlacementFlags(overrides=overrides)))
    assert (by_name[UP0], by_name[UP1], by_name[UP2]) == expected


@pytest.mark.parametrize("word", ["--n-cpu-moe", "--n-cpu-moe x", "--n-cpu-ffn -1"])
def test_short_forms_without_a_number_are_refused(word):
    """A short form among overrides that lacks its number is an error that quotes it."""
    with pytest.raises(GraphError, match="needs a number of layers"):
        placed(PlacementFlags(overrides=(word,)))


def test_a_mistyped_buffer_type_proposes_the_nearest():
    """A buffer type in lower case, or nearly right, is proposed by its name."""
    with pytest.raises(GraphError, match="did you mean CUDA0"):
        placed(PlacementFlags(overrides=("exps=cuda1",)))
