"""`doublehead tables [N] [--runs DIR]`: the paper's tables beside what your runs gave."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro

from doublehead.errors import UserError, shown_to_user
from doublehead.paper import TABLES

PROGRAM = "doublehead tables"
MINIATURE_NOTE = "Yours: small detectors on generated shapes. Compare the order of the rows, not the numbers."


@dataclass(frozen=True)
class Options:
    """What the command line takes."""

    numbers: Annotated[tuple[int, ...], tyro.conf.Positional, tyro.conf.arg(metavar="N...")] = ()
    """Tables of the paper, 1 to 6; without one, all."""
    runs: str | None = None
    """Folder that holds finished runs, at any depth; several of one recipe become mean ± standard deviation."""
    format: Literal["text", "markdown", "csv"] = "text"
    out: str | None = None
    """Write to this file instead of the screen."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace the file that --out names."""
    miniature: tyro.conf.FlagCreatePairsOff[bool] = False
    """Runs of the miniature recipes instead of the paper's."""
    smoke: tyro.conf.FlagCreatePairsOff[bool] = False
    """Train every row of the tables for two steps on small generated pictures, to see that its recipe runs."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 2 on a user's error, with 1 when a recipe does not run."""
    with shown_to_user():
        description = "Print the paper's Tables 1 to 6 beside your runs; a blank cell means that there is no run."
        options = tyro.cli(Options, prog=PROGRAM, description=description, args=arguments)
        numbers = check_numbers(options.numbers, options.miniature)
        if options.smoke:
            if options.runs or options.out or options.miniature or options.format != "text":
                raise UserError("--smoke goes alone: it trains the recipes and compares nothing")
            failed = run_smoke(numbers)
        else:
            print_tables(options, numbers)
            return
    if failed:
        raise SystemExit(1)


def check_numbers(numbers: Sequence[int], miniature: bool = False) -> list[int]:
    """The requested tables; by default all of them.

    Raises:
        UserError: the paper has no such table, or the table has no row in miniature.
    """
    small = [number for number, table in TABLES.items() if any(row.miniature for row in table.rows)]
    for number in numbers:
        if miniature and number in TABLES and number not in small:
            raise UserError(f"Table {number} has no row in miniature: {', '.join(map(str, small))} have")
        if number not in TABLES:
            raise UserError(f"there is no Table {number} to compare with: the tables are {', '.join(map(str, TABLES))}")
    return list(dict.fromkeys(numbers)) or (small if miniature else list(TABLES))


def print_tables(options: Options, numbers: Sequence[int]) -> None:
    """Compare and print, or write `--out`.

    Raises:
        UserError: `--runs` is no folder, or `--out` cannot be written.
    """
    from doublehead.analysis.tables import Found, as_csv, as_text, collect, compare
    from doublehead.cli.outputs import check_output
    from doublehead.engine.files import write_text

    check_output(options.out, "--out", options.overwrite)
    found = collect(options.runs) if options.runs is not None else Found()
    blocks = []
    for number in numbers:
        table = TABLES[number]
        lines = compare(table, found, options.miniature)
        if options.miniature:
            table = replace(table, title=f"In miniature: {table.title}", note=MINIATURE_NOTE)
        if options.format == "csv":
            blocks.append(as_csv(number, table, lines))
        else:
            blocks.append(as_text(number, table, lines, markdown=options.format == "markdown"))
    text = ("\n" if options.format == "csv" else "\n\n").join(blocks)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    if options.out is None:
        print(text)
    else:
        write_text(options.out, text + "\n")
        print(f"{len(numbers)} table{'s' if len(numbers) > 1 else ''} written to {options.out}")


def run_smoke(numbers: Sequence[int]) -> list[str]:
    """Train every recipe of the tables for two steps; returns the names of those that failed."""
    from tqdm import tqdm

    from doublehead.engine.smoke import smoke
    from doublehead.recipes import RECIPES

    names = list(dict.fromkeys(row.recipe for number in numbers for row in TABLES[number].rows))
    failed = []
    bar = tqdm(names, desc="recipes", unit="recipe", disable=None)
    for name in bar:
        try:
            result = smoke(RECIPES[name])
        except Exception as error:  # the others are still tried
            failed.append(name)
            tqdm.write(f"{name}: FAILED: {type(error).__name__}: {error}")
            continue
        losses = " -> ".join(f"{loss:.2f}" for loss in result.losses)
        tqdm.write(f"{name}: runs ({result.parameters / 1e6:.1f} M parameters, loss {losses}, {result.seconds:.1f} s)")
    print(f"{len(names) - len(failed)} of {len(names)} recipes run")
    return failed
