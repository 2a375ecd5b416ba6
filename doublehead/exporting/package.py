"""AOTInductor packages: detectors compiled ahead of time for one shape, one device and one kind of machine."""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .compiler import inductor_settings
from .description import INPUTS, NAME

INDUCTOR_OPTIONS: dict[str, Any] = {}
"""Further settings for `torch._inductor.config`, such as {"max_autotune": True}."""

ENTRY = f"extra/{NAME}.json"
LONGEST = 64 << 20
"""The size limit of a description in bytes; usual ones have some kilobytes."""


def write_package(
    program: nn.Module, example: tuple[torch.Tensor, torch.Tensor], description: dict[str, Any], path: Path
) -> None:
    """Compile `program`, and write it as a package with its description to `path`.

    The package calls `torch.ops.doublehead`, so `doublehead.ops` must be imported where it runs.

    Args:
        program: `DetectorProgram`.
        example: its inputs; the package takes their shapes and device.  If the description says "dynamic_batch", they
            have at least 2 images, and the package takes any number up to that.
        path: ends in .pt2.
    """
    shapes = None
    if description.get("dynamic_batch"):
        batch = torch.export.Dim("batch", min=1, max=len(example[0]))
        shapes = {name: {0: batch} for name in INPUTS}
    with torch.no_grad():
        exported = torch.export.export(program, example, dynamic_shapes=shapes)
    with tempfile.TemporaryDirectory(prefix="doublehead-compiler-") as folder:
        settings = inductor_settings(Path(folder)) | INDUCTOR_OPTIONS
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=settings)
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/{ENTRY}", json.dumps(description, indent=2))


def read_description(path: Path) -> dict[str, Any] | None:
    """The description of a package; None: it has none, or is damaged.  Nothing in the file is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith(ENTRY)), None)
            if name is None or archive.getinfo(name).file_size > LONGEST:
                return None
            found = json.loads(archive.read(name))
            return found if isinstance(found, dict) else None
    except (zipfile.BadZipFile, ValueError, KeyError, RecursionError, NotImplementedError):
        return None
