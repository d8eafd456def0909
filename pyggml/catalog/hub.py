"""The header of a model on Hugging Face, without its weights: `hub_header` reads it by ranges and keeps a sparse file."""

from __future__ import annotations

import atexit
import mmap
import os
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from .. import config
from ..errors import FormatError, PyggmlError
from ..files import aside
from ..gguf.header import MAGIC, header_end

__all__ = ["PREFIX", "headers_folder", "hub_header"]

#: What the name of a model on the hub begins with, here and on our command line.
PREFIX = "hf:"
#: What is read first, and how long a header may be.
_FIRST_BYTES, _MOST_BYTES = 1 << 20, 1 << 28
#: How long the hub may take for its first answer.
_ANSWER_S = 15.0
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_INSTEAD = "download the file and name it, or give a name from `pyggml models`"


def headers_folder() -> Path:
    """Return the folder of headers in the user's cache; one that goes with the process if that cannot be written."""
    try:
        folder = config.cache_dir() / "headers"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return _passing_folder()
    return folder if os.access(folder, os.W_OK) else _passing_folder()


@cache
def _passing_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="pyggml-headers-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def hub_header(name: str) -> Path:
    """Return a sparse file with the header of ``REPO[:QUANT]`` and the size of the model; of a split model the first of them.

    Parameters
    ----------
    name : str
        Such as ``ggml-org/gpt-oss-20b-GGUF:MXFP4``. ``HF_ENDPOINT`` and ``HF_TOKEN`` are those of huggingface_hub.

    Raises
    ------
    FormatError
        The repository is unknown, has no such file, or the file is no GGUF.
    PyggmlError
        huggingface_hub is not installed, or the hub cannot be reached.

    Notes
    -----
    The file is the one that llama.cpp's ``-hf`` takes: mirrors `find_best_model`. A header that was read before is read again
    only if the hub has another file.
    """
    try:
        from huggingface_hub import HfApi, HfFileSystem
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise PyggmlError(
            f"-hf {name}: huggingface_hub is not installed", hint=f"pip install huggingface_hub, or {_INSTEAD}"
        ) from None
    http_errors: Any = (OSError, *HfHubHTTPError.__bases__)  # also those of the HTTP client that the library uses
    repo, _, quant = name.partition(":")
    endpoint = config.hub_endpoint()
    try:
        api = HfApi(endpoint=endpoint)
        api.model_info(repo, timeout=_ANSWER_S)  # the other calls try again for half a minute where there is no network
        files = {f.path: f for f in api.list_repo_tree(repo, recursive=True) if hasattr(f, "blob_id")}
        paths = _chosen(name, list(files), quant)
        hub = HfFileSystem(endpoint=endpoint, skip_instance_cache=True)
        kept = [_kept(hub, repo, files[path]) for path in paths]
        return kept[0]
    except HFValidationError as error:
        raise FormatError(f"-hf {name}", str(error).splitlines()[0], hint="give -hf OWNER/NAME[:QUANT]") from None
    except http_errors as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            reason = "there is no such repository, or it is private or gated"
            raise FormatError(f"-hf {name}", reason, hint="check the name; set HF_TOKEN if it needs one") from None
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise PyggmlError(f"-hf {name}: the hub cannot be reached: {first}", hint=_INSTEAD) from None


def _chosen(name: str, paths: list[str], quant: str) -> list[str]:
    """Return the file that is meant, with its other parts behind it."""
    models = [p for p in paths if p.endswith(".gguf") and not re.search(r"mmproj|imatrix|mtp-", p)]
    firsts = [p for p in models if (m := _SPLIT.search(p)) is None or int(m[1]) == 1]
    for tag in [quant] if quant else ["Q4_K_M", "Q8_0"]:
        found = next((p for p in firsts if re.search(rf"{re.escape(tag)}[.-]", p, re.IGNORECASE)), None)
        if found:
            break
    else:
        found = firsts[0] if firsts and not quant else None
    if found is None:
        there = ", ".join(firsts[:8]) or "none"
        raise FormatError(f"-hf {name}", "the repository has no such GGUF file", hint=f"its models: {there}")
    split = _SPLIT.search(found)
    if split is None:
        return [found]
    parts = [f"{found[: split.start()]}-{i:05d}-of-{split[2]}.gguf" for i in range(1, int(split[2]) + 1)]
    missing = next((p for p in parts if p not in models), None)
    if missing is not None:
        raise FormatError(f"-hf {name}", f"the repository lacks {missing}", hint=_INSTEAD)
    return parts


def _kept(hub: Any, repo: str, file: Any) -> Path:
    """Return the local file of one on the hub, whose header is read if it is not there; parts of a model share a folder."""
    folder = headers_folder() / "hub" / re.sub(r"[^\w.-]", "--", repo)
    path = folder / Path(file.path).name
    stamp = path.with_suffix(".blob")
    if path.exists() and stamp.exists() and stamp.read_text() == file.blob_id:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    n = _FIRST_BYTES
    with hub.open(f"{repo}/{file.path}", "rb", block_size=_FIRST_BYTES) as remote:
        head = remote.read(min(n, file.size))
        if not head.startswith(MAGIC):
            raise FormatError(f"-hf {repo}: {file.path}", "this is no GGUF file", offset=0, hint=_INSTEAD)
        while (end := _end(head, is_last=len(head) >= min(file.size, _MOST_BYTES), what=file.path)) is None:
            head += remote.read(len(head))
    with aside(path) as part, part.open("wb") as out:
        out.write(head[:end])
        out.truncate(file.size)
    with aside(stamp) as part:
        part.write_text(file.blob_id)
    return path


def _end(head: bytes, *, is_last: bool, what: str) -> int | None:
    """Return where the header ends; None if what was read is too short for it."""
    with mmap.mmap(-1, len(head)) as mapped:
        mapped.write(head)
        try:
            return header_end(what, mapped)
        except FormatError:
            if is_last:
                raise
            return None
