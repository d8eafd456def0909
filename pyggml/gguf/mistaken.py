"""GGUF files that are not language models, so that errors can say what a file is."""

from __future__ import annotations

from ..errors import FormatError
from .file import GGUFFile

__all__ = ["require_model"]

#: By ``general.type`` or architecture: what the file is, and what to do.
_KINDS = {
    "mmproj": ("the projector of a model that sees or hears (mmproj)", "give the language model that it belongs to"),
    "clip": ("the projector of a model that sees or hears (mmproj)", "give the language model that it belongs to"),
    "adapter": ("a LoRA adapter", "give the base model; pyggml does not apply adapters"),
    "imatrix": ("an importance matrix for quantising", "give the model that it was made from"),
    "controlvector": ("a control vector", "give the model that it was made for"),
    "vocab": ("a vocabulary without weights", "give the whole model"),
    **dict.fromkeys(
        ("flux", "sd1", "sd3", "sdxl", "wan", "hyvid", "ltxv", "qwen_image", "lumina2", "aura", "hidream", "cosmos"),
        ("an image or video model", "give a language model"),
    ),
}


def require_model(file: GGUFFile) -> None:
    """Refuse a file that does not contain a model's weights.

    Raises
    ------
    FormatError
        The file is of another kind, by ``general.type``, architecture, keys or tensors; the text says which.
    """
    metadata, tensors = file.metadata, file.tensors
    kinds = [metadata.get("general.type"), metadata.get("general.architecture")]
    if "imatrix.chunk_count" in metadata or "imatrix.datasets" in metadata:
        kinds.append("imatrix")
    if "adapter.type" in metadata or (tensors and all(name.endswith((".lora_a", ".lora_b")) for name in tensors)):
        kinds.insert(0, "adapter")
    if not tensors:
        kinds.append("vocab")
    for kind in kinds:
        if isinstance(kind, str) and kind in _KINDS:
            what, hint = _KINDS[kind]
            raise FormatError(file.path, f"this is {what}, not a language model", hint=hint)
