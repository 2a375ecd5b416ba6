"""Reads a COCO JSON file, recognises other JSON formats, and checks the types of values."""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any

from ..errors import DataError
from .paths import check_regular

LISTS = ("images", "annotations", "categories")
MAX_SIDE = 10**9
"""The largest accepted side of an image in pixels."""
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxlist, _repr.maxdict, _repr.maxstring, _repr.maxother, _repr.maxlong = 2, 6, 3, 120, 80, 40


def load_coco(path: Path, has_boxes: bool = True) -> dict[str, list[Any]]:
    """The file's contents, in which `images`, `annotations` and `categories` are lists.

    Args:
        has_boxes: whether `annotations` must be present; a test split has none.

    Raises:
        DataError: the file cannot be read, is not JSON, or is JSON in another format; the message names known ones.
    """
    check_regular(path, "annotation")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # JSONDecodeError names line and column
        raise DataError(f"{path}: invalid JSON: {error}", "invalid JSON") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}", "missing file") from error
    if not has_boxes and isinstance(content, dict):
        content.setdefault("annotations", [])
    lists = isinstance(content, dict) and all(isinstance(content.get(key), list) for key in LISTS)
    other = _annotations_without_boxes(content["annotations"]) if lists else _other_kind(content)
    seems = f"; it seems to be {other}" if other else ""
    for key in LISTS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path}: no list '{key}' at the top level: not COCO instances{seems}", "invalid JSON")
    if other:
        raise DataError(f"{path}: not COCO instances{seems}, which has no boxes", "invalid JSON")
    return content


def _other_kind(content: Any) -> str | None:
    """The name of another known annotation format; None: unknown."""
    if isinstance(content, list):
        return _kind_of_list(content)
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("shapes"), list):
        return "LabelMe's annotation of one picture"
    if "_via_img_metadata" in content or any(isinstance(v, dict) and "regions" in v for v in content.values()):
        return "a project of the VGG Image Annotator (VIA)"
    return _annotations_without_boxes(content.get("annotations"))


def _annotations_without_boxes(annotations: Any) -> str | None:
    """The name of another COCO task, whose files have the same three lists; None: unknown."""
    entries = [entry for entry in annotations if isinstance(entry, dict)] if isinstance(annotations, list) else []
    if not entries or any("bbox" in entry for entry in entries):
        return None
    keys = set().union(*entries[:100])
    kinds = {"segments_info": "COCO's panoptic annotations", "caption": "COCO's captions",
             "keypoints": "COCO's keypoints without boxes", "question_id": "answers to questions (VQA)"}  # fmt: skip
    return next((kind for key, kind in kinds.items() if key in keys), None)


def _kind_of_list(content: list[Any]) -> str | None:
    keys = set(content[0]) if content and isinstance(content[0], dict) else set()
    if {"image_id", "score"} <= keys:
        return "a list of detections (COCO's submission format), not the ground truth they are measured with"
    if {"image_id", "caption"} <= keys:
        return "a list of captions (COCO's submission format)"
    if {"image", "annotations"} <= keys:
        return "annotations in CreateML's format"
    return "an export of Label Studio in its own format" if {"data", "annotations"} <= keys else None


def shown(value: Any) -> str:
    """A value for a message, in one short line."""
    return _repr.repr(value)


def is_id(value: Any) -> bool:
    """Whether `value` is an integer in JSON; `true` and 1.0 are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def id_of(entry: Any, where: str) -> int:
    """The id of `entry`.

    Raises:
        DataError: it has none, or `entry` is not a JSON object.
    """
    if not isinstance(entry, dict):
        raise DataError(f"{where}: is {shown(entry)}, an object with an id is accepted", "malformed record")
    if not is_id(entry.get("id")):
        raise DataError(f"{where}: id is {shown(entry.get('id'))}, an integer is accepted", "malformed record")
    return entry["id"]


def as_number(value: Any) -> float | None:
    """A JSON number as a float, infinity if it is too large; None: it is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def as_side(value: Any) -> int | None:
    """An image's side in pixels, an integer that may be written as 640.0; 0 for null; None: it is something else."""
    if value is None:
        return 0
    number = as_number(value)
    if number is None or not 0 <= number <= MAX_SIDE or number != int(number):
        return None
    return int(number)


def as_flag(value: Any) -> bool | None:
    """0 or 1 as a bool, a missing value as 0; None: it is something else."""
    return bool(value) if value in (None, 0, 1) else None
