"""The command line: `doublehead COMMAND ...`, one module per command.

A command's module is imported when it is called, so that the list of commands and an unknown name take no time.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from doublehead.errors import UserError, shown_to_user
from doublehead.version import __version__

COMMANDS = {
    "data": "count what a data set holds, and draw a sheet of it",
    "train": "train a detector, evaluate it, draw what it finds",
    "evaluate": "measure a trained detector on a data set",
    "calibrate": "find the gate that makes a Double-Head-Ext faster at next to no loss",
    "detect": "draw what a detector finds in pictures",
    "quantize": "prepare a detector for int8 on CPUs, and measure what it costs",
    "export": "write a detector as a program that needs no model code (AOTInductor, ONNX)",
    "convert": "turn another project's checkpoint into a model of this library",
    "analyze": "draw the paper's Figures 2-4 and 6-10 for any detectors and data",
    "tables": "print the paper's tables beside the results of your runs",
    "info": "show versions, compiled parts, and what runs each operator on each device",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The program `doublehead`; exits with 2 on a user's error, such as an unknown command."""
    with shown_to_user():
        name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
        if name in ("-h", "--help"):
            print(listing())
            return
        if name == "--version":
            print(f"doublehead {__version__}")
            return
        check_command(name)
        importlib.import_module(f"{__name__}.{name}").main(rest)


def listing() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "usage: doublehead COMMAND ...",
            "",
            "Double-Head R-CNN. The commands are",
            *lines,
            "",
            "doublehead COMMAND --help lists a command's options, doublehead --version prints the version.",
            "On several processes:",
            "torchrun --nproc-per-node N -m doublehead COMMAND ...",
        ]
    )


def check_command(name: str) -> None:
    """Refuse an unknown command.

    Raises:
        UserError: names the most similar command, or all of them.
    """
    if name in COMMANDS:
        return
    import difflib  # only now: it brings more modules than all of this

    similar = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {similar[0]!r}?" if similar else f"the commands are: {', '.join(COMMANDS)}"
    raise UserError(f"there is no command {name!r}; {hint}")
