"""Charts of an evaluation: precision over recall, confusion of classes, scores of right and wrong detections.

Every one can be told apart in grey: by line style, hatching and brightness, not by colour alone.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from doublehead.engine.coco_metrics import Details
from doublehead.engine.files import write_bytes
from doublehead.engine.matching import rates
from doublehead.engine.metrics_text import shown_score
from doublehead.engine.pictures import shown_name

NAMED_CURVES = 10
"""Up to this many classes each have a curve with a name."""
NUMBERED_CLASSES = 20
"""Up to this many classes the confusion matrix has numbers in its cells."""
NAMED_CLASSES = 100
"""Up to this many classes each has its name at the confusion matrix; beyond, some have."""
LONGEST_NAME = 24
BINS = 40
RIGHT, WRONG = "#2166ac", "#f4a582"  # dark and light, in grey too
_STYLES = ("-", "--", "-.", ":", (0, (8, 2)))
_COLOURS = (
    "#1b6ca8", "#d1495b", "#3f7d20", "#e08e1b", "#6c4ab6", "#12868c", "#a3458f", "#7a5c2e", "#4f6d9e", "#8a8d0f"
)  # fmt: skip


def draw_charts(details: Details, folder: Path, title: str = "") -> list[str]:
    """Draw `CHARTS` into an existing folder, replacing those that are there.

    Returns:
        The names of the files.
    """
    for name, draw in CHARTS.items():
        draw(details, folder / name, title)
    return list(CHARTS)


# ---------------------------------------------------------------------- precision over recall


def draw_pr_curves(details: Details, path: str | Path, title: str = "") -> None:
    """Precision over recall at IoU 0.5, and its mean over IoU 0.50 to 0.95: of all classes together and of each."""
    figure = _figure(13, 5.6)
    known = [k for k in range(len(details.classes)) if (details.precision[:, :, k] > -1).any()]
    panels = {
        "IoU 0.50": details.precision[0][:, known],
        "mean over IoU 0.50, 0.55, ... 0.95": details.precision[:, :, known].mean(axis=0),
    }
    names = [_drawn(details.classes[k], k + 1) for k in known]
    order = np.argsort(-details.precision[:, :, known].mean(axis=(0, 1)), kind="stable")
    for axes, (name, curves) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        _draw_curves_of_classes(axes, curves, names, order)
        axes.set(title=name, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    missing = [_drawn(name, k + 1) for k, name in enumerate(details.classes) if k not in known]
    note = _listed("without a box in the ground truth", missing)
    figure.suptitle(_joined(title, "precision over recall", note))
    _save(figure, path)


def _draw_curves_of_classes(axes: Any, curves: np.ndarray, names: Sequence[str], order: np.ndarray) -> None:
    """The mean curve of all classes, and each class's: with its name, or all in grey with the best and worst named.

    Args:
        curves: `[recall, class]`.
        order: of the classes, the best first; a class has the same line in every panel.
    """
    recall, areas = np.linspace(0, 1, len(curves)), curves.mean(axis=0)
    many = len(names) > NAMED_CURVES
    named = [*order[:3], *order[-3:]] if many else list(order)
    handles, labels = [], []
    if many:
        handles += axes.plot(recall, curves, color="0.82", lw=0.8, zorder=1)[:1]
        labels.append(f"each of {len(names)} classes; best and worst:")
    for number, k in enumerate(named if len(names) > 1 else []):
        style, colour = _STYLES[number % len(_STYLES)], _COLOURS[number % len(_COLOURS)]
        marker = {"marker": "o^sDvP"[number % 6], "markevery": (3 + 2 * number, 20), "ms": 5} if number > 3 else {}
        handles += axes.plot(recall, curves[:, k], color=colour, ls=style, lw=1.5, zorder=2, **marker)
        labels.append(f"{100 * areas[k]:.1f}  {names[k]}")
    mean = axes.plot(recall, curves.mean(axis=1), color="black", lw=3, zorder=3)
    whole = f"{100 * areas.mean():.1f}  " + (f"mean of {len(names)} classes" if len(names) > 1 else names[0])
    axes.legend([*mean, *handles], [whole, *labels], title="AP, percent", fontsize="small", loc="upper left",
                bbox_to_anchor=(1.0, 1.0), handlelength=3.5)  # fmt: skip


# ---------------------------------------------------------------------- which class is taken for which


def draw_confusion(details: Details, path: str | Path, title: str = "") -> None:
    """The confusion matrix at the threshold of the best F1, with what was missed and what was made up."""
    matrix, count = details.confusion, len(details.classes)
    side = float(np.clip(3.5 + 0.45 * (count + 1), 5.5, 15.0))
    figure = _figure(side + 2.0, side + 1.0)
    axes = figure.subplots()
    shares = _shares(matrix)
    # The square root: a confusion of one in a hundred is still seen.
    image = axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
    axes.add_patch(_hatched((count - 0.5, count - 0.5)))
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=30, ticks=np.sqrt([0, 0.01, 0.05, 0.2, 0.5, 1]))
    bar.ax.set_yticklabels(["0 %", "1 %", "5 %", "20 %", "50 %", "100 %"])
    bar.set_label("share of the row; in the last row, of the column")
    if count <= NUMBERED_CLASSES:
        _write_numbers(axes, matrix, shares)
    _name_classes(axes, details)
    axes.axhline(count - 0.5, color="black", lw=1)
    axes.axvline(count - 0.5, color="black", lw=1)
    axes.set_xlabel("detected as (detections)")
    axes.set_ylabel("ground truth (boxes)")
    why = "best F1" if details.best_f1["f1"] else "none is right"
    threshold = f"scores from {shown_score(details.best_f1['threshold'])} on ({why})"
    rule = "best score first, each takes the free box it overlaps most, IoU ≥ 0.5; crowd and difficult boxes left out"
    figure.suptitle(f"{_joined(title, 'confusion, ' + threshold)}\n{rule}", fontsize="medium")
    _save(figure, path)


def _shares(matrix: np.ndarray) -> np.ndarray:
    """Each cell as a share of its row; in the last row, of its column."""
    rows = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    rows[-1] = matrix[-1] / np.maximum(1, matrix.sum(axis=0))
    return rows


def _write_numbers(axes: Any, matrix: np.ndarray, shares: np.ndarray) -> None:
    size = float(np.clip(200 / len(matrix), 8, 12))
    for (row, column), number in np.ndenumerate(matrix):
        if number:
            colour = "white" if shares[row, column] > 0.4 else "black"
            axes.text(column, row, _short(number), ha="center", va="center", color=colour, fontsize=size)


def _name_classes(axes: Any, details: Details) -> None:
    """Names at both axes, with the number of boxes, and of detections."""
    count = len(details.classes)
    step = max(1, -(-count // NAMED_CLASSES))
    shown = [*range(0, count, step), count]
    names = [*(_drawn(name, k + 1) for k, name in enumerate(details.classes)), "background"]
    size = float(np.clip(760 / (len(shown) + 30), 5, 11))
    totals = details.confusion.sum(axis=1), details.confusion.sum(axis=0)
    rows, columns = ([f"{names[k]} ({_short(total[k])})" for k in shown[:-1]] for total in totals)
    upright = {"rotation": 90} if count > 5 else {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(shown, [*columns, "missed"], fontsize=size, **upright)
    axes.set_yticks(shown, [*rows, "background"], fontsize=size)


def _hatched(corner: tuple[float, float]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, facecolor="white", edgecolor="0.6", hatch="////", lw=0)


# ---------------------------------------------------------------------- scores


def draw_scores(details: Details, path: str | Path, title: str = "") -> None:
    """How many detections are right and wrong at each score, and what a threshold there gives."""
    figure = _figure(13, 5)
    counts, curves = figure.subplots(1, 2)
    ranked, best = details.ranking, details.best_f1
    chosen = shown_score(best["threshold"])
    _draw_histogram(counts, ranked.scores[ranked.hits], ranked.scores[~ranked.hits])
    all_rates = rates(ranked)
    lines = (("f1", "F1", "black", "-", 2.5), ("precision", "precision", RIGHT, "--", 1.5),
             ("recall", "recall", "#b2182b", ":", 2.0))  # fmt: skip
    for field, label, colour, style, width in lines:
        curves.plot(all_rates.thresholds, getattr(all_rates, field), color=colour, ls=style, lw=width, label=label)
    curves.set(title="all classes together, by threshold", ylim=(0, 1.02))
    for axes in (counts, curves):
        axes.axvline(best["threshold"], color="black", lw=1.5, ls="-.", label=f"threshold {chosen}")
        axes.set(xlabel="score", xlim=(0, 1))
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend()
    rest = f"precision {100 * best['precision']:.1f}, recall {100 * best['recall']:.1f}"
    figure.suptitle(_joined(title, f"best F1 {100 * best['f1']:.1f} at score {chosen}: {rest}"))
    _save(figure, path)


def _draw_histogram(axes: Any, right: np.ndarray, wrong: np.ndarray) -> None:
    """Right ones upwards, wrong ones downwards, so that neither hides the other."""
    edges = np.linspace(0, 1, BINS + 1)
    for scores, sign, name, colour, hatch in ((right, 1, "right", RIGHT, ""), (wrong, -1, "wrong", WRONG, "///")):
        counts = np.histogram(scores, edges)[0]
        axes.bar(edges[:-1], sign * counts, 1 / BINS, align="edge", color=colour, hatch=hatch, edgecolor="black",
                 linewidth=0.5, label=f"{len(scores)} {name}")  # fmt: skip
    axes.axhline(0, color="black", lw=1)
    axes.set(title="detections by score, right ones upwards, at IoU 0.5", ylabel="detections")
    if len(right) + len(wrong):
        axes.set_yscale("symlog", linthresh=10)  # of the low scores there are many
    else:
        axes.text(0.25, 0.25, "no detections", ha="center", va="center")
        axes.set(ylim=(-1, 1), yticks=[0])
    axes.yaxis.set_major_formatter(lambda value, _: _short(abs(round(value))))


CHARTS: dict[str, Callable[[Details, Path, str], None]] = {
    "pr_curves.png": draw_pr_curves,
    "confusion.png": draw_confusion,
    "scores.png": draw_scores,
}
"""File name -> what draws it."""


# ---------------------------------------------------------------------- text in charts


def _drawn(name: str, number: int) -> str:
    """A class name as matplotlib draws it; one in letters that its font lacks becomes `class 3`."""
    text = shown_name(name, LONGEST_NAME).strip()
    if not text or not {ord(letter) for letter in text} <= _letters():
        return f"class {number}"
    return text.replace("$", r"\$")  # no formula


@functools.lru_cache
def _letters() -> frozenset[int]:
    """What DejaVu Sans, matplotlib's own font, can draw."""
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf").get_charmap())


def _listed(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"{what}: " + (", ".join(names) if len(names) <= 4 else f"{len(names)} classes")


def _joined(*parts: str) -> str:
    return "; ".join(part.replace("$", r"\$") if not index else part for index, part in enumerate(parts) if part)


def _short(number: int) -> str:
    """At most four characters and a unit: 9999, 12k, 3.4M."""
    if number < 10_000:
        return str(number)
    return f"{number / 1e3:.0f}k" if number < 999_500 else f"{number / 1e6:.1f}M"


# ---------------------------------------------------------------------- figures


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: str | Path) -> None:
    """Write a figure as a PNG, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    memory = io.BytesIO()
    FigureCanvasAgg(figure).print_png(memory)
    write_bytes(path, memory.getvalue())
