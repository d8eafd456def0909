"""Foresight: how fast a model will be on hardware that need not be there, from its sizes, data sheets and fitted rates.

`estimate` is the door: a model by name or file, devices and a host by name, flags; tokens a second with ranges.
"""

from .api import Estimate, Speed, estimate, machine_of, model_shape, speed_of
from .estimate import Machine, Setting, Unpredicted
from .shape import ModelShape

__all__ = [
    "Estimate",
    "Machine",
    "ModelShape",
    "Setting",
    "Speed",
    "Unpredicted",
    "estimate",
    "machine_of",
    "model_shape",
    "speed_of",
]
