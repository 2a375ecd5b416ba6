"""The description of an exported detector for its user, stored as JSON with the program."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..config import ImageConfig, Recipe, to_dict
from ..version import __version__

FORMAT = "doublehead.exported/1"
INPUTS = ("pixels", "sizes")
OUTPUTS = ("boxes", "scores", "labels", "count")

PRECISIONS = ("fp32", "bf16", "fp16", "int8")

NAME = "doublehead"
"""Key of the description in an ONNX or OpenVINO file's metadata; `extra/doublehead.json` in a package."""


def describe(
    kind: str,
    recipe: Recipe,
    classes: Sequence[str],
    category_ids: Sequence[int],
    shape: Sequence[int],
    device: str,
    dynamic_batch: bool = False,
    precision: str = "fp32",
) -> dict[str, Any]:
    """
    Args:
        kind: "aoti", "onnx" or "openvino".
        recipe: the model's recipe, with the exported read-out.
        classes: label i is `classes[i - 1]`.
        category_ids: label i is category `category_ids[i - 1]` of the data set.
        shape: the pixels' shape, (B, 3, H, W).
        device: "cpu" or "cuda".
        dynamic_batch: whether the program accepts fewer than B images.
        precision: "fp32", "bf16" or "int8" (OpenVINO): what its layers compute in, where the processor can.
    """
    batch, slots = shape[0], recipe.model.detection.max_detections
    return {
        "format": FORMAT,
        "kind": kind,
        "doublehead": __version__,
        "torch": torch.__version__,
        "device": device,
        "machine": machine(device),
        "recipe": recipe.name,
        "classes": list(classes),
        "category_ids": [int(i) for i in category_ids],
        "dynamic_batch": dynamic_batch,
        "precision": precision,
        "inputs": {
            "pixels": {"shape": list(shape), "dtype": "float32", "about": "normalised images, zeros beyond them"},
            "sizes": {"shape": [batch, 2], "dtype": "float32", "about": "height and width of each image in pixels"},
        },
        "outputs": {
            "boxes": {"shape": [batch, slots, 4], "dtype": "float32", "about": "x1, y1, x2, y2 in pixels of the input"},
            "scores": {"shape": [batch, slots], "dtype": "float32", "about": "best first"},
            "labels": {"shape": [batch, slots], "dtype": "int64", "about": "label i is classes[i - 1]"},
            "count": {"shape": [batch], "dtype": "int64", "about": "detections of each image; behind them is zero"},
        },
        "preprocessing": to_dict(recipe.model.image) | {"range": "0..1 before mean and std"},
        "legacy_boxes": recipe.model.legacy_boxes,
        "detection": to_dict(recipe.model.detection),
    }


def image_config(description: dict[str, Any]) -> ImageConfig:
    """The image configuration of the exported model."""
    values = description["preprocessing"]
    fields = {field.name for field in dataclasses.fields(ImageConfig)}
    return ImageConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in fields})


MOST_VALUES = 2**33
"""The largest number of pixel values in a batch that is accepted: 32 GB."""


def flaw_of(description: dict[str, Any]) -> str | None:
    """Why a description that was read from a file is invalid; None: it is valid."""
    try:
        shapes = [description["inputs"][name]["shape"] for name in INPUTS]
        classes, dynamic = description["classes"], description["dynamic_batch"]
        texts = [description[name] for name in ("kind", "device", "machine", "recipe", "torch")]
        image_config(description), description["legacy_boxes"], description["category_ids"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return f"{error} ({type(error).__name__})"
    pixels, sizes = shapes
    if not all(isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape) for shape in shapes):
        return "the inputs' shapes are not lists of positive integers"
    if len(pixels) != 4 or pixels[1] != 3 or sizes != [pixels[0], 2] or math.prod(pixels) > MOST_VALUES:
        return f"the inputs' shapes are {shapes}"
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return "the classes are not a list of names"
    if description.get("precision", "fp32") not in PRECISIONS:  # earlier versions had one
        return f"its precision is {description['precision']!r}"
    if type(dynamic) is not bool or not all(isinstance(text, str) for text in texts):
        return "a field has the wrong type"
    return None


def machine(device: str) -> str:
    """The instruction set of this machine for compiled code: "AVX2", "sm_90"."""
    if device == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    return torch.backends.cpu.get_cpu_capability()
