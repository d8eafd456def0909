"""Makes tiny random mixture-of-experts models for tests, examples and comparisons.

They load in llama.cpp and give finite logits. Equal arguments give equal bytes on any machine.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, replace
from functools import partial

from ..errors import PyggmlError
from ..types import Type
from .gguf_writer import GGUFWriter, Progress, Written
from .quantize import QUANTIZABLE
from .random_model import ARCHS, RandomModel

__all__ = ["PRESETS", "Recipe", "Sizes", "make_moe"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a tiny model. By default every row is a multiple of 256, as K-quants need."""

    layers: int = 4
    embd: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ff: int = 512  #: width of a dense feed-forward network
    ff_exp: int = 256  #: width of one expert
    experts: int = 8
    used: int = 2  #: experts that each token uses
    ctx: int = 512
    vocab: int = 320


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that determines a random model's bytes.

    Attributes
    ----------
    arch : str
        One of `ARCHS`.
    type : Type
        Type of the experts, and of other matrices without ``dense_type``; one of `QUANTIZABLE`.
    dense_type : Type, optional
        Type of other matrices. With MXFP4 experts the default is Q8_0, as in published models.
    tokenizer : str
        ``"bytes"`` (a token for each byte) or ``"none"``.
    skew : float
        0: experts are equally likely. Above 0: the router's logit of rank r is lower by ``skew * log(r)``.
    """

    arch: str
    type: Type = Type.F32
    dense_type: Type | None = None
    seed: int = 1
    tokenizer: str = "bytes"
    sizes: Sizes = Sizes()
    skew: float = 0.0


#: Recipes by name. ``fine-grained``: many small experts, of which few are used, unevenly, as in recent models.
PRESETS = {
    "fine-grained": Recipe(
        "llama",
        Type.Q8_0,
        seed=1,
        sizes=Sizes(layers=4, embd=512, heads=8, kv_heads=2, ff_exp=512, experts=32, used=4, ctx=1024),
        skew=1.5,
    )
}


def make_moe(path: str | os.PathLike[str], recipe: Recipe, *, progress: Progress | None = None) -> Written:
    """Write a random model.

    Parameters
    ----------
    path : str or os.PathLike
        Written whole or not at all; its folder must exist.
    recipe : Recipe
    progress : callable, optional
        Called with the bytes written and the total.

    Raises
    ------
    PyggmlError
        The recipe is impossible, or the file cannot be written.
    """
    if recipe.arch == "olmoe":  # llama.cpp wants its norm of k as wide as that of q
        recipe = replace(recipe, sizes=replace(recipe.sizes, kv_heads=recipe.sizes.heads))
    _check(recipe)
    model = RandomModel(recipe)
    ARCHS[recipe.arch](model)
    writer = GGUFWriter()
    for key, value_type, value in model.keys:
        if isinstance(value, list):
            writer.add_array(key, value_type, value)
        else:
            writer.add(key, value_type, value)
    for weight in model.weights:
        kind = model.type_of(weight)
        writer.add_tensor(weight.name, kind, weight.shape[::-1], partial(model.pieces, weight, kind))
    return writer.write(path, progress=progress)


def _check(recipe: Recipe) -> None:
    sizes = recipe.sizes
    small = [name for name, value in asdict(sizes).items() if value < 1]
    wrong = None
    if recipe.arch not in ARCHS:
        wrong = f"no architecture is called {recipe.arch!r}; there are {', '.join(ARCHS)}"
    elif recipe.tokenizer not in ("bytes", "none"):
        wrong = f"no tokenizer is called {recipe.tokenizer!r}; there are bytes and none"
    elif small:
        wrong = f"{small[0]} is {getattr(sizes, small[0])}, less than 1"
    elif sizes.used > sizes.experts:
        wrong = f"{sizes.used} of {sizes.experts} experts cannot be used"
    elif sizes.heads % sizes.kv_heads:
        wrong = f"{sizes.heads} heads cannot share {sizes.kv_heads} key-value heads evenly"
    elif sizes.head_dim % 2:
        wrong = f"a head of {sizes.head_dim} elements cannot be rotated in pairs"
    elif recipe.skew < 0 or not math.isfinite(recipe.skew):
        wrong = f"a skew of {recipe.skew} is not a number from 0 up"
    for kind in (recipe.type, recipe.dense_type):
        if kind is not None and kind not in QUANTIZABLE:
            names = ", ".join(known.name for known in QUANTIZABLE)
            wrong = wrong or f"weights of type {kind.name} cannot be made; there are {names}"
    if wrong:
        raise PyggmlError(f"make-moe: {wrong}")
