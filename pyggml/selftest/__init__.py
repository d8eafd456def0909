"""One command for a device that pyggml has not met: are its results right, are its copies complete, how fast is it.

`run` goes through the stages in order and fills a `Report`; `pyggml selftest` prints it, and writes it as JSON and as a page.
"""

from .report import Outcome, Report, Result, Verdict
from .run import EMULATOR, STAGES, run

__all__ = ["EMULATOR", "STAGES", "Outcome", "Report", "Result", "Verdict", "run"]
