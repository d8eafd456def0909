"""Tests a device: are its results correct, are its copies complete, how fast is it.

`run` goes through the stages in order and returns a `Report`. `pyggml selftest` prints it and writes it as JSON and a page.
"""

from .report import Outcome, Report, Result, Verdict
from .run import EMULATOR, STAGES, is_there, run

__all__ = ["EMULATOR", "STAGES", "Outcome", "Report", "Result", "Verdict", "is_there", "run"]
