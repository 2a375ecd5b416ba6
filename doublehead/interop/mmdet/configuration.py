"""Reads a model's conventions from the text of its MMDetection configuration.

A checkpoint's metadata holds the whole configuration as text.  The text is searched, never executed; a value is used
only if all its occurrences agree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..mapping import ConversionError

STRIDES = (4, 8, 16, 32, 64)
UNSUPPORTED = {
    r"\bLegacy\w+": "the conventions of MMDetection 1.x",
    r"""type=["']soft_nms["']""": "soft NMS",
    r"""type=["']GN["']""": "group normalisation",
    r"\bcenter_offset=(?!0(?:\.0*)?\b)": "anchors that are moved off the cells",
}
"""Pattern in a configuration -> the feature it asks for, which this library does not have."""


class Configuration(NamedTuple):
    """The values found; None: not stated."""

    style: str | None = None
    """The backbone's style: `caffe` or `pytorch`."""
    mean: list[float] | None = None
    """The mean of pixel values in 0 .. 255, in the network's channel order; so is `std`."""
    std: list[float] | None = None
    channel_order: str | None = None
    image_scale: tuple[int, int] | None = None
    """(short side, longest side) in pixels."""
    anchor_sizes: tuple[float, ...] | None = None
    aspect_ratios: tuple[float, ...] | None = None
    conv_box_scale: float | None = None


def read_configuration(meta: Mapping[str, Any]) -> Configuration:
    """Search the configuration in a checkpoint's metadata (3.x: `cfg`, 2.x: `config`).

    Raises:
        ConversionError: it asks for a feature that this library does not have.
    """
    text = next((meta[key] for key in ("cfg", "config") if isinstance(meta.get(key), str)), "")
    for pattern, what in UNSUPPORTED.items():
        if found := re.search(pattern, text):
            raise ConversionError(f"the configuration in the checkpoint asks for {what} ({found[0]}): not supported")
    style = _only(r"""style=["'](caffe|pytorch)["']""", text)
    to_rgb = _only(r"\b(?:bgr_to_rgb|to_rgb)=(True|False)", text)
    mean, std = _numbers("mean", text), _numbers("std", text)
    known = to_rgb and all(values and len(values) == 3 for values in (mean, std))
    scale, scales, ratios = _numbers("(?:img_)?scale", text), _numbers("scales", text), _numbers("ratios", text)
    if scales and len(scales) > 1:
        raise ConversionError(f"the configuration in the checkpoint has anchors of {len(scales)} sizes a level: "
                              "not supported")  # fmt: skip
    factor = _only(r"\breg_roi_scale_factor=([\d.]+)", text)
    return Configuration(
        style,
        *((mean, std, "rgb" if to_rgb == "True" else "bgr") if known else (None, None, None)),
        image_scale=(int(min(scale)), int(max(scale))) if scale and len(scale) == 2 else None,
        anchor_sizes=tuple(scales[0] * stride for stride in STRIDES) if scales else None,
        aspect_ratios=tuple(ratios) if ratios else None,
        conv_box_scale=float(factor) if factor else None,
    )


def class_names(meta: Mapping[str, Any]) -> list[str] | None:
    """The class names in a checkpoint's metadata (3.x: `dataset_meta`, 2.x: `CLASSES`); None: there are none."""
    notes = meta.get("dataset_meta")
    mappings = [notes, meta] if isinstance(notes, Mapping) else [meta]
    found = next((mapping[key] for mapping in mappings for key in ("classes", "CLASSES") if mapping.get(key)), None)
    if isinstance(found, str):
        return [found]
    texts = isinstance(found, Sequence) and all(isinstance(name, str) for name in found)
    return list(found) if texts else None


def _only(pattern: str, text: str) -> str | None:
    """The captured text if all matches agree; None: there is no match, or they differ."""
    found = {match[1] for match in re.finditer(pattern, text)}
    return found.pop() if len(found) == 1 else None


def _numbers(field: str, text: str) -> list[float] | None:
    """The numbers in a list or tuple assigned to `field`; None: there is none, or they differ."""
    inside = _only(rf"\b{field}=[\[(]([\d\s.,]+)[\])]", text)
    return None if inside is None else [float(number) for number in re.findall(r"\d+\.?\d*", inside)]
