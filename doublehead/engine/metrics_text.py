"""Metrics of an evaluation as text."""

from __future__ import annotations

import math
from typing import Any

COCO_NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def format_metrics(metrics: dict[str, Any]) -> str:
    """The metrics as a small table, in percent; `-` where there is nothing to measure."""
    return "\n".join([*_accuracy_lines(metrics), *_work_lines(metrics)])


def format_each(metrics: dict[str, dict[str, Any]]) -> str:
    """The metrics of several read-outs side by side, in percent; `-` where there is nothing to measure."""
    first = next(iter(metrics.values()))
    if "AP" not in first:
        return "\n".join(f"{name}: {_accuracy_lines(values)[0]}" for name, values in metrics.items())
    width = max(len("read-out"), *(len(name) for name in metrics))
    voc = "voc" in first
    header = [*COCO_NUMBERS, *(["VOC mAP50"] if voc else []), "RoIs of box head"]
    lines = ["  ".join([f"{'read-out':<{width}}", *(f"{name:>5}" for name in header)])]
    for name, values in metrics.items():
        row = [_percent(values[column]) for column in COCO_NUMBERS]
        row += [_percent(values["voc"]["mAP50"])] if voc else []
        row += [f"{_percent(values['box_rois']['share'])} %"]
        cells = (f"{cell:>{max(5, len(column))}}" for cell, column in zip(row, header, strict=True))
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    classes = max(len("AP of class"), *(len(name) for name in first["classes"]))
    lines += ["", "  ".join([f"{'AP of class':<{classes}}", *(f"{name:>5}" for name in metrics)])]
    for label in first["classes"]:
        aps = (f"{_percent(v['classes'][label]['AP']):>{max(5, len(name))}}" for name, v in metrics.items())
        lines.append("  ".join([f"{label:<{classes}}", *aps]))
    return "\n".join(lines)


def _work_lines(metrics: dict[str, Any]) -> list[str]:
    rois = metrics.get("box_rois")
    if rois is None:
        return []
    return ["", f"the box head saw {rois['seen']:.0f} of {rois['all']:.0f} RoIs an image, {_percent(rois['share'])} %"]


def _accuracy_lines(metrics: dict[str, Any]) -> list[str]:
    if "AP" not in metrics:
        return [f"{metrics['images']} images, {metrics['detections']} detections; no ground truth to measure against"]
    lines = ["  ".join(f"{name:>5}" for name in COCO_NUMBERS)]
    lines += ["  ".join(f"{_percent(metrics[name]):>5}" for name in COCO_NUMBERS), ""]
    voc = metrics.get("voc")
    width = max(len("class"), *(len(name) for name in metrics["classes"]))
    lines.append(f"{'class':<{width}}     AP   AP50" + ("  VOC AP50" if voc else ""))
    for name, values in metrics["classes"].items():
        row = f"{name:<{width}}  {_percent(values['AP']):>5}  {_percent(values['AP50']):>5}"
        lines.append(row + (f"  {_percent(voc['classes'][name]):>8}" if voc else ""))
    if voc:
        lines += ["", f"VOC mAP at IoU 0.5, area under the precision-recall curve (2010+): {_percent(voc['mAP50'])}"]
    if best := metrics.get("best_f1"):
        rates = f"precision {_percent(best['precision'])}, recall {_percent(best['recall'])}"
        score = shown_score(best["threshold"])
        lines += ["", f"best F1 at IoU 0.5: {_percent(best['f1'])}, of scores from {score} on ({rates})"]
    return lines


def shown_score(threshold: float) -> str:
    """A threshold in at most three digits, rounded down: the detection that lies on it is above what is written."""
    return f"{math.floor(1000 * threshold + 1e-6) / 1000:g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
