"""What a context may be asked to be: types of the KV cache."""

from __future__ import annotations

import pytest
import tiny

from pyggml.commands import _model_options
from pyggml.errors import GraphError
from pyggml.models.context import CACHE_TYPES, ContextFlags, ContextParams
from pyggml.types import Type

QUANTISED = [t for t in CACHE_TYPES if t.is_quantized]


@pytest.mark.parametrize("type", CACHE_TYPES, ids=lambda t: t.ggml_name)
def test_a_cache_may_be_of_each_type_of_llama_cpp(type):
    """Where blocks divide a head, K and V take any of the types; a quantised V settles flash attention."""
    params = ContextParams.resolve(ContextFlags(n_ctx=256, type_k=type, type_v=type), tiny.hparams("llama"))
    assert (params.type_k, params.type_v, params.flash_attn) == (type, type, True)
    assert params.auto_flash_attn is not type.is_quantized


@pytest.mark.parametrize("type", QUANTISED, ids=lambda t: t.ggml_name)
@pytest.mark.parametrize("side", ["K", "V"])
def test_blocks_that_do_not_divide_a_head_are_refused(side, type):
    """The error names the block and the head, and what may be asked for instead."""
    hp = tiny.hparams("llama", n_embd_head_k=80, n_embd_head_v=80)
    flags = ContextFlags(n_ctx=256, **{f"type_{side.lower()}": type})
    with pytest.raises(GraphError, match=rf"{side} cache of {type.ggml_name} .* 32, .* 80 \(-ct{side.lower()} f16"):
        ContextParams.resolve(flags, hp)


@pytest.mark.parametrize("type", [Type.Q4_K, Type.MXFP4, Type.I32], ids=lambda t: t.ggml_name)
def test_other_types_are_refused(type):
    """The error lists what a cache may be of."""
    with pytest.raises(GraphError, match=rf"type_k cannot be {type.ggml_name}.*iq4_nl, q5_0, q5_1"):
        ContextParams.resolve(ContextFlags(n_ctx=256, type_k=type), tiny.hparams("llama"))


def test_a_quantised_v_needs_flash_attention():
    """Switched off, it is refused; K does not need it."""
    hp = tiny.hparams("llama")
    assert not ContextParams.resolve(ContextFlags(n_ctx=256, type_k=Type.Q4_0, flash_attn="off"), hp).flash_attn
    with pytest.raises(GraphError, match="V cache of q4_0 needs flash attention"):
        ContextParams.resolve(ContextFlags(n_ctx=256, type_v=Type.Q4_0, flash_attn="off"), hp)


def test_one_tensor_for_k_and_v_has_one_type():
    """Attention over a latent space refuses two types."""
    hp = tiny.hparams("deepseek2", n_embd_head_k_mla=64, n_embd_head_v_mla=64)
    assert hp.is_mla
    with pytest.raises(GraphError, match="K of q8_0 and V of f16"):
        ContextParams.resolve(ContextFlags(n_ctx=256, type_k=Type.Q8_0), hp)


def test_help_lists_the_types():
    """What `-ctk` says is what is accepted."""
    assert tuple(t.ggml_name for t in CACHE_TYPES) == _model_options.CACHE_TYPES
