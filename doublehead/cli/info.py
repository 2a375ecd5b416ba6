"""`doublehead info`: what this installation is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

PROGRAM = "doublehead info"
DESCRIPTION = "Show versions, compiled parts, and what runs each operator on each device."


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 2 on an unknown option."""
    argparse.ArgumentParser(prog=PROGRAM, description=DESCRIPTION).parse_args(arguments)
    from doublehead.cli.installation import report  # only now: --help need not wait for PyTorch

    print(report())
