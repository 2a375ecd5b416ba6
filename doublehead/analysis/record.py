"""Writes a figure's numbers: a CSV file for each table, and one JSON record of all with how they were made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from doublehead.analysis import windows
from doublehead.analysis.output import write_csv
from doublehead.analysis.provenance import provenance
from doublehead.analysis.readers import Reader
from doublehead.analysis.study import Study
from doublehead.engine.checkpoint import find_model
from doublehead.engine.files import write_json

FORMAT = "doublehead figure 1"


class Rows(NamedTuple):
    """A table of numbers; None: there is no number."""

    name: str
    columns: Sequence[str]
    rows: list[Sequence[Any]]


def write_tables(folder: Path, figure: str, tables: Sequence[Rows], content: Mapping[str, Any]) -> list[str]:
    """Write NAME.csv for each table, and FIGURE.json.

    The record has `format`, `figure`, all of `provenance`, then `content`, and `tables`: name -> `columns` and `rows`,
    as in the CSV files.

    Returns:
        The names of the files.
    """
    for table in tables:
        write_csv(folder / f"{table.name}.csv", table.columns, table.rows)
    found = {table.name: {"columns": list(table.columns), "rows": table.rows} for table in tables}
    record = {"format": FORMAT, "figure": figure, **provenance(), **content, "tables": found}
    write_json(folder / f"{figure}.json", record, indent=None)
    return [*(f"{table.name}.csv" for table in tables), f"{figure}.json"]


def describe_study(study: Study) -> dict[str, Any]:
    """What a record says of the heads and the data.

    Returns:
        heads: of each trained model the head's name, the checkpoint as it was given and its file's SHA-256, the kind,
            and which of its branches give classes and boxes.
        data: name, numbers of images and objects, and of windows of each object.
        seconds: how long this call measured.
    """
    return {
        "heads": [_describe(reader) for reader in study.readers],
        "data": {
            "name": study.dataset.name,
            "images": len(study.sizes),
            "objects": study.objects,
            "windows_per_object": windows.WINDOWS,
        },
        "seconds": round(study.seconds, 1),
    }


def _describe(reader: Reader) -> dict[str, Any]:
    content = find_model(Path(reader.checkpoint)).read_bytes()
    sources = reader.readout.sources
    return {
        "name": reader.name,
        "checkpoint": reader.checkpoint,
        "kind": reader.recipe.model.head.kind,
        "classes_from": list(sources.classes),
        "boxes_from": sources.boxes,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
