"""Pictures of boxes (`draw_boxes`, `detection_grid`) and of a training (`draw_curves`)."""

from __future__ import annotations

import colorsys
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from doublehead.engine.files import write_bytes
from doublehead.engine.metrics_text import shown_score

Colour = tuple[int, int, int]
JPEG_SIDE = 65_500
"""Longest side in pixels that libjpeg writes."""
LONGEST_NAME = 60
"""Most characters of a class name that are drawn."""


def to_picture(image: torch.Tensor) -> Image.Image:
    """`Tensor[3, H, W]` uint8 RGB -> PIL picture."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def from_picture(picture: Image.Image) -> torch.Tensor:
    """RGB PIL picture -> `Tensor[3, H, W]` uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def class_colour(label: int) -> Colour:
    """A bright colour for label 1, 2, ...; consecutive labels differ clearly (golden-ratio steps of hue)."""
    hue = (label * 0.618034) % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 if label % 2 else 0.6, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    picture: Image.Image,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    classes: Sequence[str],
    scores: torch.Tensor | None = None,
    threshold: float = 0.0,
) -> Image.Image:
    """A copy of `picture` with boxes, class names and scores.

    Args:
        picture: any mode; the copy is RGB.
        boxes: `Tensor[N, 4]` x1, y1, x2, y2 in the picture's pixels.
        labels: `Tensor[N]`, 1 .. K; label i is `classes[i - 1]`.
        scores: `Tensor[N]` in [0, 1]; boxes below `threshold` are not drawn, the best come on top.
    """
    picture = picture.convert("RGB").copy()
    size = max(12, round(min(picture.size) / 32))
    font = drawing_font(size)
    draw = ImageDraw.Draw(picture)
    chosen = range(len(boxes))
    if scores is not None:
        chosen = [i for i in torch.argsort(scores).tolist() if scores[i] >= threshold]
    for i in chosen:
        _draw_box(draw, boxes[i].tolist(), class_colour(int(labels[i])), width=max(3, size // 6))
    for i in chosen:  # the names last, so that no box hides one
        label = int(labels[i])
        text = shown_name(classes[label - 1]) + (f" {scores[i]:.2f}" if scores is not None else "")
        _draw_name(draw, boxes[i].tolist(), text, class_colour(label), font, picture.size)
    return picture


def shown_name(name: str, longest: int = LONGEST_NAME) -> str:
    """A class name as one line of bounded length, without characters that fonts cannot draw."""
    short = name if len(name) <= longest else f"{name[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"
    return "".join(letter if letter.isprintable() else " " for letter in short)


def _draw_box(draw: ImageDraw.ImageDraw, box: list[float], colour: Colour, width: int) -> None:
    x1, y1, x2, y2 = box
    x2, y2 = max(x1, x2), max(y1, y2)
    draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(0, 0, 0), width=width + 2)  # a dark rim on any ground
    draw.rectangle((x1, y1, x2, y2), outline=colour, width=width)


def _draw_name(draw, box: list[float], text: str, colour: Colour, font, limits: tuple[int, int]) -> None:
    x1, y1 = box[:2]
    ascent, descent = font.getmetrics()
    w, h = font.getlength(text) + 6, ascent + descent
    # The name stands above the box, or inside it at the picture's upper edge; never beyond the picture.
    x = max(0, min(x1, limits[0] - w))
    y = y1 - h if y1 >= h else max(0, y1)
    draw.rectangle((x, y, x + w, y + h), fill=colour)
    bright = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 110
    draw.text((x + 3, y), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)


@functools.lru_cache
def drawing_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows most alphabets."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def detection_grid(
    images: Sequence[torch.Tensor],
    targets: Sequence[dict[str, Any]],
    outputs: Sequence[dict[str, torch.Tensor]],
    classes: Sequence[str],
    threshold: float = 0.5,
    columns: int = 2,
    side: int = 360,
    why: str = "",
) -> Image.Image:
    """Ground truth beside detections, several images on one sheet.

    Args:
        images: `Tensor[3, H, W]` uint8 each.
        targets: their `boxes` and `labels`.
        outputs: the detector's `boxes`, `labels`, `scores`.
        threshold: detections below this score are not drawn.
        columns: pairs side by side.
        side: each picture is scaled to fit a square of this many pixels.
        why: what chose the threshold.
    """
    gap, header = 12, 34
    columns = min(columns, max(1, len(images)))
    pictures, scales = [], []
    for image in images:
        scales.append(side / max(image.shape[-2:]))
        size = [max(1, round(length * scales[-1])) for length in (image.shape[-1], image.shape[-2])]
        pictures.append(to_picture(image).resize(size))
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    tops = np.cumsum([header, *(gap + max(picture.height for picture in row) for row in rows)]).tolist()
    lefts = [gap + column * (2 * side + 3 * gap) for column in range(columns)]
    sheet = Image.new("RGB", (lefts[-1] + 2 * side + 2 * gap, tops[-1]), "white")
    draw, font = ImageDraw.Draw(sheet), drawing_font(17)
    above = f"detections, score ≥ {shown_score(threshold)}" + (f" ({why})" if why else "")
    for left in lefts:
        draw.text((left, 8), "ground truth", fill="black", font=font)
        draw.text((left + side + gap, 8), above, fill="black", font=font)
    for number, (picture, scale, target, output) in enumerate(zip(pictures, scales, targets, outputs, strict=True)):
        left, top = lefts[number % columns], tops[number // columns]
        truth = draw_boxes(picture, target["boxes"] * scale, target["labels"], classes)
        boxes, scores = output["boxes"].cpu() * scale, output["scores"].cpu()
        detected = draw_boxes(picture, boxes, output["labels"].cpu(), classes, scores, threshold)
        sheet.paste(truth, (left, top))
        sheet.paste(detected, (left + side + gap, top))
    return sheet


def save_picture(path: str | Path, picture: Image.Image) -> None:
    """Write a picture atomically, in the format of its ending.  A picture too large for JPEG is scaled down."""
    kind = Image.registered_extensions()[Path(path).suffix.lower()]
    if kind == "JPEG" and max(picture.size) > JPEG_SIDE:
        factor = JPEG_SIDE / max(picture.size)
        picture = picture.resize([max(1, int(side * factor)) for side in picture.size])
    memory = io.BytesIO()
    picture.save(memory, format=kind, **({"quality": 92} if kind == "JPEG" else {}))
    write_bytes(path, memory.getvalue())


def draw_curves(records: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """Losses, AP and learning rate over the steps, from the records of a `log.jsonl`, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training = [record for record in records if "loss" in record]
    measured = [record for record in records if record.get("AP") is not None]
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    losses, precision, rate = figure.subplots(1, 3)
    _draw_losses(losses, training)
    for name, style in (("AP", "o-"), ("AP50", "s--")):
        precision.plot([r["step"] for r in measured], [100 * r[name] for r in measured], style, label=name)
    precision.set(title="validation", ylabel="percent", ylim=(0, 100))
    if measured:
        precision.legend()
    rate.plot([r["step"] for r in training], [r["lr"] for r in training], color="black")
    rate.set(title="learning rate", ylim=(0, None))
    last = max((record["step"] for record in records), default=1)
    for axes in (losses, precision, rate):
        axes.set(xlabel="step", xlim=(0, max(1, last) * 1.02))
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    memory = io.BytesIO()
    FigureCanvasAgg(figure).print_png(memory)
    write_bytes(path, memory.getvalue())


def _draw_losses(axes: Any, training: Sequence[dict[str, Any]]) -> None:
    if not training:
        axes.set(title="losses")
        return
    names = ["loss", *(name for name in training[-1] if name.startswith("loss_"))]
    steps = [record["step"] for record in training]
    for name in names:
        values = [record.get(name, np.nan) for record in training]
        style = {"color": "black", "lw": 2, "label": "total"} if name == "loss" else {"lw": 1.2, "label": name[5:]}
        axes.plot(steps, values, **style)
    positive = all(record[name] > 0 for record in training for name in names if name in record)
    axes.set(title="losses", yscale="log" if positive else "linear")
    axes.legend(fontsize="small", ncols=2)
