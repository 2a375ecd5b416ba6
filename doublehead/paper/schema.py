"""What a table of the paper consists of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One row of a table that a recipe reproduces."""

    label: str
    """The row's name in the paper."""
    recipe: str
    """The row's recipe; several rows may share a training."""
    published: tuple[float, ...]
    """Percent, in the order of the table's columns."""
    miniature: str | None = None
    """The recipe of the same row in miniature (`doublehead.recipes.miniature`)."""
    fusion: str | None = None
    """The fusion with which the trained model is read out (Table 3); None: the recipe's."""


@dataclass(frozen=True)
class OtherMethod:
    """One row of another method, with the numbers the paper quotes; there is no recipe for it."""

    label: str
    """The method, and the number of its reference in the paper."""
    backbone: str
    published: tuple[float | None, ...]
    """Percent, in the order of the table's columns; None: the paper has a dash."""


@dataclass(frozen=True)
class Table:
    """One table of the paper."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    """What a reader needs to know to compare the numbers."""
    split: str | None = None
    """The split the numbers were measured on; None: the one the recipe validates on."""
    parameters: tuple[float | None, ...] = ()
    """The parameters of each row's conv-head, in M = 2^20; empty: the table has no such column."""
    others: tuple[OtherMethod, ...] = ()
    """Rows of other methods, which have no recipe here."""
