"""Foresight: predicted speeds of a model on hardware that need not be present, from sizes, data sheets and rates.

`estimate` takes a model by name or file, devices and a host by name, and flags. It returns tokens/s with ranges.
"""

from .api import Estimate, Speed, estimate, machine_of, model_shape, speed_of
from .estimate import Machine, Setting
from .shape import ModelShape

__all__ = [
    "Estimate",
    "Machine",
    "ModelShape",
    "Setting",
    "Speed",
    "estimate",
    "machine_of",
    "model_shape",
    "speed_of",
]
