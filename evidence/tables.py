"""Writes the tables and charts of the docs' accuracy from the records in evidence/records.

python evidence/tables.py           rewrites what stands between `<!-- table NAME RECORD -->` and `<!-- end -->`, and
                                    the charts in docs/evidence
python evidence/tables.py --check   writes nothing; lists what is out of date, and then exits with 1
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import charts
import factors
import views
from reading import Record, load

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
CHARTS = ROOT / "docs" / "evidence"
BLOCK = re.compile(r"(<!-- table ([\w-]+)(?: ([\w-]+))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)
PARTS = {
    "bccd-longer": "longer", "heads-shapes": "heads", "heads-factors": "factors", "implementation": "checks",
    "conv_norms": "checks", "balance-weights": "balance", "sliding-windows": "figures", "pearson": "figures",
}  # fmt: skip
"""Record -> the part of run.sh that makes it, where the names differ."""
OF_ONE: dict[str, Callable[[Record], str]] = {
    "kinds": views.kinds,
    "differences": views.differences,
    "losses": views.losses,
    "by-step": views.by_step,
    "fusions": views.fusions,
    "readouts": views.readouts,
    "depth": factors.depth,
    "curves": views.curves,
    "curves-AP75": lambda record: views.curves(record, "AP75"),
    "regression": views.regression,
    "windows": views.windows,
    "crossings": views.crossings,
    "factors": factors.factors,
    "norms": views.norms,
    "implementation": views.implementation,
    "own-data": views.own_data,
    "precision": views.precision,
    "quantized": views.quantized,
    "start": views.start,
    "origin": views.origin,
}
"""Name -> the table of one record."""
OF_ALL = {"findings": views.findings, "costs": views.costs, "throughput": views.throughput}
"""Name -> the table of all records."""


def record_of(name: str, second: str | None) -> str | None:
    """The record of a block; None: it is of all records.  For `chart` the second word is the chart's name.

    Raises:
        KeyError: there is no such table or chart.
    """
    if name not in {**OF_ONE, **OF_ALL, "chart": None}:
        raise KeyError(name)
    return charts.PICTURES[second][1] if name == "chart" else second


def table(name: str, second: str | None, records: dict[str, Record]) -> str:
    """The Markdown of a block whose record is there."""
    if second is None:
        return OF_ALL[name](records)
    if name == "chart":
        return f"![{charts.PICTURES[second][0]}](evidence/{second}.png)"
    return OF_ONE[name](records[second])


def rewritten(text: str, records: dict[str, Record]) -> str:
    """A page with the tables of the records; the first block of a missing one says which part of run.sh makes it."""
    missed = set()

    def block(found: re.Match[str]) -> str:
        record = record_of(found[2], found[3])
        if record is None or record in records:
            return f"{found[1]}{table(found[2], found[3], records)}\n{found[5]}"
        note = f"*Not measured yet: `evidence/run.sh {PARTS.get(record, record)}` does it.*\n"
        first = record not in missed
        missed.add(record)
        return f"{found[1]}{note if first else ''}{found[5]}"

    return BLOCK.sub(block, text)


def main() -> None:
    records, check = load(), sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not check:
        sys.exit(__doc__)
    old = []
    for page in PAGES:
        text = page.read_text()
        new = rewritten(text, records)
        if new == text:
            continue
        old.append(str(page.relative_to(ROOT)))
        if not check:
            page.write_text(new)
    for name in charts.outdated(CHARTS, records):
        old.append(f"docs/evidence/{name}.png")
        if not check:
            charts.draw(CHARTS, name, records)
    print("\n".join(old))
    sys.exit(1 if check and old else 0)


if __name__ == "__main__":
    main()
