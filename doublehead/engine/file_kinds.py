"""Recognises files that were given instead of a model, and says what to do with them."""

from __future__ import annotations

from pathlib import Path

PICTURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
LEGACY_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""The number at the start of the pickles in files of torch.save before version 1.6."""


def other_kind(path: Path) -> str | None:
    """A description of a file that is no safetensors file; None: not recognised."""
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        return "an empty file"
    if path.suffix.lower() in (".pt2", ".onnx", ".xml"):
        return "an exported program, which doublehead.exporting.load runs; here its model.safetensors is needed"
    pickled = head[:1] == b"\x80" and path.suffix.lower() != ".safetensors"
    if pickled or head.startswith(b"PK") or LEGACY_TORCH in head:
        return f"a checkpoint of another project; first make a model of it: doublehead convert {path} FOLDER"
    if head.startswith(PICTURES):
        return "a picture, where a model.safetensors or the folder of a run is needed: the checkpoint comes first"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
    if head.lstrip()[:1] in (b"{", b"["):
        return "a JSON file; give the model.safetensors, or the folder that holds it"
    return None
