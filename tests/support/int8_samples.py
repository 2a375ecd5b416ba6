"""What the tests of precisions share: a small Ext detector with its int8.json, without measuring for it."""

from __future__ import annotations

from pathlib import Path

from doublehead.data import build_dataset
from doublehead.engine.checkpoint import load_model
from doublehead.engine.int8_file import int8_path, write_int8
from doublehead.engine.quantizing import ground_truth_digest, readout_of
from doublehead.models.quantized import int8_layers
from doublehead.weights.digest import of_weights
from tests.support.analysis_detector import save_detector


def save_int8_detector(folder: Path, kind: str = "double_head_ext", fp32: float = 0.5) -> Path:
    """The folder of a "run" with an int8.json: every layer but the first has a scale; the second stays in float."""
    save_detector(folder, kind)
    write_plan(folder, fp32=fp32)
    return folder


def write_plan(folder: Path, fp32: float = 0.5, **changes) -> Path:
    """int8.json of the detector in `folder`, as quantize writes it."""
    model, recipe, classes, _ = load_model(folder)
    names = int8_layers(model)
    validation = build_dataset(recipe.data, "val", classes=classes)
    content = {
        "doublehead": "0", "weights": of_weights(model.state_dict()), "scales": dict.fromkeys(names[1:], 0.05),
        "left_out": [{"layer": names[1], "AP_before": 0.1, "AP_after": 0.2, "output_error": 0.3}], "most_loss": 0.3,
        "measured": {
            "fp32": fp32, "int8": 0.499, "int8_all_layers": 0.1, "images": len(validation), "data": validation.name,
            "ground_truth": ground_truth_digest(validation), "readout": readout_of(model.detector.readout.detection),
            "bits": 7, "rest": "fp32", "processor": "",
        },
        "calibration": {"images": 2, "data": "shapes (train)", "files": ["a", "b"]},
    }  # fmt: skip
    write_int8(int8_path(folder), content | changes)
    return int8_path(folder)
