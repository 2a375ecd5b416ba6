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
import views
from reading import Record, load

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
CHARTS = ROOT / "docs" / "evidence"
BLOCK = re.compile(r"(<!-- table ([\w-]+)(?: ([\w-]+))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NO_RECORD = "*No record yet.*"
OF_ONE: dict[str, Callable[[Record], str]] = {
    "kinds": views.kinds,
    "differences": views.differences,
    "losses": views.losses,
    "by-step": views.by_step,
    "fusions": views.fusions,
    "readouts": views.readouts,
    "depth": views.depth,
    "curves": views.curves,
    "curves-AP75": lambda record: views.curves(record, "AP75"),
    "regression": views.regression,
    "windows": views.windows,
    "crossings": views.crossings,
    "factors": views.factors,
    "norms": views.norms,
    "implementation": views.implementation,
    "own-data": views.own_data,
    "start": views.start,
    "origin": views.origin,
}
"""Name -> the table of one record."""
OF_ALL = {"findings": views.findings, "costs": views.costs}
"""Name -> the table of all records."""


def table(name: str, record: str | None, records: dict[str, Record]) -> str:
    """The Markdown of a block; for `chart` the second word is the chart's name.

    Raises:
        KeyError: there is no such table.
    """
    if record is None:
        return OF_ALL[name](records)
    if name == "chart":
        words, of = charts.PICTURES[record]
        return f"![{words}](evidence/{record}.png)" if of in records else NO_RECORD
    make = OF_ONE[name]
    return make(records[record]) if record in records else NO_RECORD


def rewritten(text: str, records: dict[str, Record]) -> str:
    """A page with the tables of the records."""
    return BLOCK.sub(lambda found: f"{found[1]}{table(found[2], found[3], records)}\n{found[5]}", text)


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
