"""Foresight: how fast a model will be on hardware that need not be there, from its sizes, data sheets and fitted rates.

`estimate` is the door: a model by name or file, devices and a host by name, flags; tokens a second with ranges, and memory.
"""

from .api import Estimate, MemoryUse, Speed, estimate, machine_of, model_shape
from .estimate import Machine, Setting, Unpredicted
from .shape import ModelShape

__all__ = [
    "Estimate",
    "Machine",
    "MemoryUse",
    "ModelShape",
    "Setting",
    "Speed",
    "Unpredicted",
    "estimate",
    "machine_of",
    "model_shape",
]
