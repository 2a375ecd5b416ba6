"""Writes a figure's numbers: a CSV file for each table, and one JSON record of all with how they were made."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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


def write_tables(study: Study, tables: Sequence[Rows], **more: Any) -> list[str]:
    """Write NAME.csv for each table, and `FIGURE.json`.

    The record has `format`, `figure`, all of `provenance`, `heads` (name, checkpoint as given and the SHA-256 of its
    file, kind, and which of its branches give classes and boxes), `data` (name, images, objects, windows of each
    object), `seconds` of the measurement in this call, and `tables`: name -> `columns` and `rows`, as in the CSV files.

    Args:
        more: further plain values for the record.

    Returns:
        The names of the files.
    """
    for table in tables:
        write_csv(study.folder / f"{table.name}.csv", table.columns, table.rows)
    record = {
        "format": FORMAT,
        "figure": study.figure,
        **provenance(),
        "heads": [_describe(reader) for reader in study.readers],
        "data": {
            "name": study.dataset.name,
            "images": len(study.sizes),
            "objects": study.objects,
            "windows_per_object": windows.WINDOWS,
        },
        "seconds": round(study.seconds, 1),
        **more,
        "tables": {table.name: {"columns": list(table.columns), "rows": table.rows} for table in tables},
    }
    write_json(study.folder / f"{study.figure}.json", record, indent=None)
    return [*(f"{table.name}.csv" for table in tables), f"{study.figure}.json"]


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
