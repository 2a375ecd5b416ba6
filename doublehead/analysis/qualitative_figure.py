"""Draws Figures 9 and 10: a row for each case, with ground truth, conv-head alone, fc-head alone and Ext."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from doublehead.data import DetectionDataset
from doublehead.engine.pictures import draw_boxes, to_picture
from doublehead.ops.boxes import box_iou

if TYPE_CHECKING:
    from doublehead.analysis.qualitative_cases import Case, Kind, Verdict
    from doublehead.analysis.qualitative_proposals import Origin

Box = tuple[float, float, float, float]
NAMES = {"conv": "conv-head alone", "fc": "fc-head alone", "Ext": "Ext, fused"}
SIDE = 440  # pixels of a panel's longer side
LEAST_VIEW = 160  # pixels of the image
MOST_ORIGINS = 3  # as many IoUs fit below a panel
COLOURS = {"found": "limegreen", "missed": "red", "duplicate": "red", "unclear": "orange"}


def draw_cases(
    kind: Kind,
    cases: list[Case],
    outputs: list[dict[str, dict[str, Tensor]]],
    origins: list[list[Origin]],
    dataset: DetectionDataset,
    threshold: float,
) -> Any:
    """The figure of one kind.

    Args:
        kind: the kind of the cases.
        cases: one for each row.
        outputs: for each case, read-out -> detections (see `judge`) of its image.
        origins: for each case, the proposals of the object's boxes, drawn in the panels of both heads.
        dataset: the images and their ground truth.
        threshold: detections with a lower score are not drawn.
    """
    from matplotlib.figure import Figure

    height = 4.5 if any(origins) else 4.2  # a second line below the pictures
    figure = Figure(figsize=(14.4, height * len(cases) + 0.5), layout="constrained")
    panels = figure.subplots(len(cases), 4, squeeze=False)
    for row, case, output, yellow in zip(panels, cases, outputs, origins, strict=True):
        _draw_case(row, case, output, yellow, dataset, threshold)
    title = f"{kind.title} (detections with a score of at least {threshold:g})"
    if any(origins):
        title += (
            f"\nyellow: the proposals of the {kind.head}-head's boxes, which both heads see\n"
            "dashed: where the panel's head moves them (below, their IoU: before → after)"
        )
    figure.suptitle(title, fontsize="x-large")
    return figure


def _draw_case(
    row: Any,
    case: Case,
    output: dict[str, dict[str, Tensor]],
    origins: list[Origin],
    dataset: DetectionDataset,
    threshold: float,
) -> None:
    image, target = dataset[case.image]
    view = view_around(case.box, (image.shape[-1], image.shape[-2]))
    _draw_panel(row[0], image, view, target, dataset.classes)
    _frame(row[0], case.box, view, "black")
    name = dataset.classes[case.label - 1]
    row[0].set(title="ground truth", ylabel=dataset.file_names[case.image], xlabel=f"framed: {name}")
    for axes, (readout, title) in zip(row[1:], NAMES.items(), strict=True):
        verdict = case.verdicts[readout]
        _draw_panel(axes, image, view, output[readout], dataset.classes, threshold)
        _frame(axes, case.box, view, COLOURS[verdict.outcome])
        text = score_text(verdict, case.at_box.get(readout))
        if readout in case.at_box:  # a single head; Ext takes its boxes from the conv-head
            _draw_origins(axes, origins, readout, view)
            text += origins_text(origins, readout, case.box) if origins else ""
        axes.set(title=f"{title}: {verdict.outcome}", xlabel=text)


def view_around(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part of an image to show: x1, y1, x2, y2, at least four times the object and `LEAST_VIEW` wide and high.

    Args:
        box: x1, y1, x2, y2 of the object.
        size: (width, height) of the image; a small image is shown whole.
    """
    side = max(LEAST_VIEW, 4 * max(box[2] - box[0], box[3] - box[1]))
    spans = []
    for low, high, limit in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        length = min(limit, round(side))
        start = min(max(0, round((low + high - length) / 2)), limit - length)
        spans.append((start, start + length))
    (x1, x2), (y1, y2) = spans
    return x1, y1, x2, y2


def _draw_panel(
    axes: Any,
    image: Tensor,
    view: tuple[int, int, int, int],
    found: dict[str, Tensor],
    classes: list[str],
    threshold: float = 0.0,
) -> None:
    x1, y1, x2, y2 = view
    scale = _scale(view)
    picture = to_picture(image).crop(view).resize((round((x2 - x1) * scale), round((y2 - y1) * scale)))
    boxes = found["boxes"]
    seen = (boxes[:, 0] < x2) & (boxes[:, 2] > x1) & (boxes[:, 1] < y2) & (boxes[:, 3] > y1)
    boxes = (boxes[seen] - torch.tensor([x1, y1, x1, y1])) * scale
    scores = found["scores"][seen] if "scores" in found else None
    axes.imshow(draw_boxes(picture, boxes, found["labels"][seen], classes, scores, threshold))
    axes.set(xticks=[], yticks=[])


def _scale(view: tuple[int, int, int, int]) -> float:
    return SIDE / max(view[2] - view[0], view[3] - view[1])


def _frame(axes: Any, box: Box, view: tuple[int, int, int, int], colour: str) -> None:
    """A dashed frame around `box` and its name, inside the picture, on white to be visible on any background."""
    from matplotlib.patches import Rectangle

    scale, margin = _scale(view), 24
    corners = []
    for axis in (0, 1):
        end = (view[axis + 2] - view[axis]) * scale - 4
        low, high = ((box[side] - view[axis]) * scale for side in (axis, axis + 2))
        corners.append((max(3, low - margin), min(end, high + margin)))
    (x1, x2), (y1, y2) = corners
    for edge, width, style in (("white", 5, "-"), (colour, 3.5, (0, (3, 1.5)))):
        axes.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=edge, linewidth=width, linestyle=style)
        )


def _draw_origins(axes: Any, origins: list[Origin], head: str, view: tuple[int, int, int, int]) -> None:
    """Draw the proposals in yellow over the dashed boxes to which `head` moves them; each with a dark outline."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    scale, corner = _scale(view), torch.tensor(view[:2]).repeat(2)
    moved = [(origin.moved[head], "white", (0, (4, 2))) for origin in origins]
    for box, colour, style in [*moved, *((origin.proposal, "yellow", "-") for origin in origins)]:
        x1, y1, x2, y2 = ((box - corner) * scale).tolist()
        axes.add_patch(
            Rectangle(
                (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=2, linestyle=style,
                path_effects=[withStroke(linewidth=4, foreground="black")],
            )
        )  # fmt: skip


def origins_text(origins: list[Origin], head: str, box: Box) -> str:
    """A line with the IoUs of at most three proposals, each before and after `head` moves it."""
    truth = torch.tensor([box])
    pairs = [
        [f"{float(box_iou(one[None], truth)):.2f}" for one in (origin.proposal, origin.moved[head])]
        for origin in origins[:MOST_ORIGINS]
    ]
    return f"\nIoU {', '.join(' → '.join(pair) for pair in pairs)}" + (", ..." if len(origins) > MOST_ORIGINS else "")


def score_text(verdict: Verdict, at_box: float | None) -> str:
    """The text below a panel."""
    if verdict.duplicate is not None:
        text = f"scores {verdict.score:.2f} and {verdict.duplicate:.2f}"
    elif verdict.score is None:
        text = "no detection of it"
    else:
        text = f"score {verdict.score:.2f}"
    return text if at_box is None else f"{text}; {at_box:.2f} on the object's own box"
