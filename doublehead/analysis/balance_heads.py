"""Figure 6 from the record of `analyze heads`: AP over the balance weights, mean and standard error over seeds.

The record's variants that change l_fc and l_conv and nothing else are the cells of the grid.  Backbone and RPN are the
same in all of them, and so are the RoIs of a seed.  So read-outs are also compared seed by seed, in a second table.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from doublehead.analysis.balance_figure import Weights
from doublehead.analysis.balance_results import FIGURE, NUMBERS, Grid, write_figure
from doublehead.analysis.record import Rows
from doublehead.config import HeadConfig, LossConfig, ModelConfig, ReadOutName
from doublehead.errors import UserError
from doublehead.models.readout import EXT_SOURCES

HEADS_FORMAT = "doublehead heads 1"
COLUMNS = ("l_fc", "l_conv", "readout", *(f"{name}{end}" for name in NUMBERS for end in ("", " se")), "seeds")
DIFFERENCE_COLUMNS = ("l_fc", "l_conv", "readout", "minus", "AP difference", "AP se", "seeds")
COMPARED: tuple[tuple[ReadOutName, ReadOutName], ...] = (("split", "fc"), ("split", "conv"), ("fused", "split"))
"""Differences that the paper reports: two heads against either one, fused classes against the fc-head's."""
FUSION = "complementary"
_FIELDS = ("model.loss.l_fc", "model.loss.l_conv")

Results = dict[Weights, dict[ReadOutName, dict[int, dict[str, float | None]]]]
"""Weights -> read-out -> seed -> `NUMBERS`, in 0 .. 1."""


def read_record(path: str) -> tuple[Results, dict[str, Any]]:
    """The results of a `heads.json` at the last step, and what of it is kept in the figure's own record.

    Raises:
        UserError: no such file, not such a record, or no variant of balance weights in it.
    """
    try:
        content = Path(path).read_bytes()
        record = json.loads(content)
        if record["format"] != HEADS_FORMAT:
            raise ValueError(f"its format is {record['format']!r}, not {HEADS_FORMAT!r}")
        results = _results(record)
    except OSError as error:
        raise UserError(f"--heads {path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--heads {path}: not a record of `doublehead analyze heads`: {error}") from error
    if not results:
        raise UserError(
            f"--heads {path}: no variant of double_head_ext changes {' and '.join(_FIELDS)} alone: train some with "
            f"--vary {_FIELDS[0]}=0.7,{_FIELDS[1]}=0.8 --varied-kinds double_head_ext"
        )
    kept = {name: record.get(name) for name in ("command", "version", "commit", "date", "start", "data", "steps")}
    return results, {"record": path, "sha256": hashlib.sha256(content).hexdigest(), **kept}


def _results(record: dict[str, Any]) -> Results:
    weights = {
        variant: (float(changes[_FIELDS[0]]), float(changes[_FIELDS[1]]))
        for variant, changes in record["variants"].items()
        if changes.keys() == set(_FIELDS)
    }
    found: Results = defaultdict(lambda: {readout: {} for readout in EXT_SOURCES})
    for one in record["results"]:
        wanted = one["kind"] == "double_head_ext" and one["step"] == record["steps"]
        if wanted and one["variant"] in weights and (one["readout"] != "fused" or one["fusion"] == FUSION):
            found[weights[one["variant"]]][one["readout"]][one["seed"]] = {name: one[name] for name in NUMBERS}
    return {key: found[key] for key in sorted(found)}


def write_results(results: Results, origin: dict[str, Any], out: Path) -> None:
    """Write figure, tables and record; `origin`: of `read_record`."""
    aps: Grid = {readout: {} for readout in EXT_SOURCES}
    errors: Grid = {readout: {} for readout in EXT_SOURCES}
    for weights, readouts in results.items():
        for readout, seeds in readouts.items():
            aps[readout][weights], errors[readout][weights] = mean_and_error(_values(seeds, "AP"))
    models = {
        (l_fc, l_conv): ModelConfig(head=HeadConfig("double_head_ext"), loss=LossConfig(l_fc=l_fc, l_conv=l_conv))
        for l_fc, l_conv in results
    }
    tables = [
        Rows(FIGURE, COLUMNS, rows(results)),
        Rows(f"{FIGURE}-differences", DIFFERENCE_COLUMNS, difference_rows(results)),
    ]
    count = max(len(seeds) for readouts in results.values() for seeds in readouts.values())
    name = f"heads alone, {count} seed{'s' if count > 1 else ''}"
    write_figure(out, name, aps, models, tables, {"heads": origin}, errors)


def rows(results: Results) -> list[list[Any]]:
    """For each pair of weights and read-out the means and standard errors over seeds; see `COLUMNS`."""
    found = []
    for weights, readouts in results.items():
        for readout, seeds in readouts.items():
            numbers = [number for name in NUMBERS for number in mean_and_error(_values(seeds, name))]
            found.append([*weights, readout, *numbers, len(seeds)])
    return found


def difference_rows(results: Results) -> list[list[Any]]:
    """The differences of `COMPARED` read-outs over the seeds that both have; see `DIFFERENCE_COLUMNS`."""
    found = []
    for weights, readouts in results.items():
        for readout, minus in COMPARED:
            ours, theirs = ({seed: one["AP"] for seed, one in readouts[which].items()} for which in (readout, minus))
            seeds = [seed for seed in ours if None not in (ours[seed], theirs.get(seed))]
            values = [ours[seed] - theirs[seed] for seed in seeds]
            found.append([*weights, readout, minus, *mean_and_error(values), len(values)])
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean, and the standard error over seeds: the sample standard deviation / sqrt(number); None: undefined."""
    if not values:
        return None, None
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _values(seeds: dict[int, dict[str, float | None]], name: str) -> list[float]:
    return [one[name] for one in seeds.values() if one[name] is not None]
