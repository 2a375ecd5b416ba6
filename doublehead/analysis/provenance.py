"""Says where, when and by what a result was made, for the JSON records that lie beside figures and tables."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from doublehead.version import __version__

PACKAGE = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, Any]:
    """What a record says of its own origin, as plain values for JSON.

    Returns:
        command: the command line as it was typed, with `doublehead` for however the program was started.
        version: the library's.
        commit: the short commit of the checkout that the library runs from, with `-dirty` after it if tracked files
            are changed; None without a checkout.
        date: today, such as "2026-11-26".
        machine: the processor's name, the number of cores that this process may use, PyTorch's threads and version;
            and `gpu`, its name, if this process has used one.

        No path is in it beyond those on the command line.
    """
    return {
        "command": command_line(sys.argv),
        "version": __version__,
        "commit": commit(PACKAGE),
        "date": datetime.date.today().isoformat(),
        "machine": {
            "processor": processor_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),  # plain text, which every reader accepts
            **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_initialized() else {}),
        },
    }


def command_line(arguments: list[str]) -> str:
    """`sys.argv` as a command: `python -m doublehead`, which has a path there, becomes `doublehead`."""
    program, *rest = arguments
    path = Path(program)
    if path.stem == "__main__":
        name = path.parent.name
    elif path.parent == PACKAGE:  # python -m doublehead.evaluate
        name = f"doublehead {path.stem}"
    else:
        name = path.name
    return shlex.join([*name.split(), *rest])


def commit(package: Path) -> str | None:
    """The commit of the checkout whose top folder holds `package`; None if there is none.

    A checkout further up does not count: it is of another project, which has an installed copy somewhere inside.
    """
    if not (package.parent / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def processor_name() -> str:
    """As the system has it, for example "AMD EPYC 9B45"."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()
