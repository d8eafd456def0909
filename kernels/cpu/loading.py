"""`LOADING`: held while kernels are imported or compiled. `os.fork` waits for it, because a child would find half of it done."""

from __future__ import annotations

import os
import threading

LOADING = threading.RLock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=LOADING.acquire, after_in_parent=LOADING.release, after_in_child=LOADING.release)
