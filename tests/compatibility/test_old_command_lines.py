"""The command lines that doublehead 0.1.0 documents are still understood, under the same module names."""

import importlib
import json

import pytest

from doublehead.config import to_dict
from doublehead.recipes import RECIPES

tyro = pytest.importorskip("tyro")


class Parsed(BaseException):
    """Stops a command when its options are known."""


def options_of(line, monkeypatch):
    """What `python -m doublehead.LINE` makes of its options."""
    cli = tyro.cli

    def stop(*arguments, **settings):
        raise Parsed(cli(*arguments, **settings))

    monkeypatch.setattr(tyro, "cli", stop)
    command, *arguments = line.split()
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(f"doublehead.{command}").main(arguments)
    return parsed.value.args[0]


def value(options, path):
    for name in path.split("."):
        options = getattr(options, name)
    return options


DATA = "--data.root data/coco --data.val-split val2017"
LINES = {
    "train": {},
    "train bccd-small --data.root data/BCCD": {"data.root": "data/BCCD", "data.format": "voc", "train.steps": 480},
    "train double-head-ext-r50-fpn --data.root data/coco --train.amp bf16": {
        "data.format": "coco",
        "train.amp": "bf16",
        "model.head.kind": "double_head_ext",
        "train.milestones": RECIPES["double-head-ext-r50-fpn"].train.milestones,
    },
    "train --train.steps 48 --train.milestones 34 44 --train.clip-grad-norm None --train.ema_decay=0.999": {
        "train.steps": 48,
        "train.milestones": (34, 44),
        "train.clip_grad_norm": None,
        "train.ema_decay": 0.999,
    },
    "train --on-bad-record skip --data.max-skipped 0 --data.background keep --data.max-pixels 5 --data.outside-root": {
        "data.on_bad_record": "skip",
        "data.max_skipped": 0.0,
        "data.background": "keep",
        "data.max_pixels": 5,
        "data.outside_root": True,
    },
    "train --model.backbone.weights None --model.head.non-local.groups 2 --model.head.non-local.no-enabled --out o": {
        "model.backbone.weights": None,
        "model.head.non_local.groups": 2,
        "model.head.non_local.enabled": False,
        "out": "o",
    },
    "train --model.roi.level-rule detectron2 --model.roi.conv-box-scale 1 --model.detection.ext-gate 0.1": {
        "model.roi.level_rule": "detectron2",
        "model.roi.conv_box_scale": 1.0,
        "model.detection.ext_gate": 0.1,
    },
    "train --model.backbone.stride-in-1x1 --model.image.min-size 640 800 --model.rpn.straddle 0": {
        "model.backbone.stride_in_1x1": True,
        "model.image.min_size": (640, 800),
        "model.rpn.straddle": 0.0,
    },
    f"evaluate models/double-head {DATA}": {"checkpoint": "models/double-head", "data.val_split": "val2017"},
    f"evaluate m {DATA} --out results.json --metrics m.json --device cpu": {"out": "results.json", "metrics": "m.json"},
    "evaluate m --readout split --fusion max --ext-gate 0.1": {"readout": "split", "fusion": "max", "ext_gate": 0.1},
    "evaluate m --readouts all --fusions none max average complementary": {
        "readouts": ("all",),
        "fusions": ("none", "max", "average", "complementary"),
    },
    "detect runs/bccd-small-1 photos/ more/*.jpg --out found": {
        "checkpoint": "runs/bccd-small-1",
        "images": ("photos/", "more/*.jpg"),
        "out": "found",
        "score_threshold": 0.5,
    },
    "detect m a.jpg --out o --batch-size 8 --amp bf16 --threads 3 --score-threshold 0.3 --max-pixels 9": {
        "batch_size": 8,
        "amp": "bf16",
        "threads": 3,
        "score_threshold": 0.3,
        "max_pixels": 9,
    },
    "export runs/shapes-ext-1 detector.pt2": {"checkpoint": "runs/shapes-ext-1", "out": "detector.pt2", "batch": 1},
    "export m o.onnx --format onnx --batch 4 --height 800 --width 1344 --device cpu --no-check": {
        "format": "onnx",
        "batch": 4,
        "height": 800,
        "width": 1344,
        "check": False,
    },
    "export m o.pt2 --dynamic-batch --batch 2 --readout fc --fusion average --ext-gate 0.2": {
        "dynamic_batch": True,
        "readout": "fc",
        "fusion": "average",
        "ext_gate": 0.2,
    },
    "convert model_final_b275ba.pkl models/detectron2 --style pytorch": {
        "src": "model_final_b275ba.pkl",
        "dst": "models/detectron2",
        "style": "pytorch",
    },
    "convert a.pth b --format maskrcnn_benchmark --classes names.txt --set model.backbone.norm_eps=1e-5 x=[640]": {
        "format": "maskrcnn_benchmark",
        "classes": "names.txt",
        "set": ("model.backbone.norm_eps=1e-5", "x=[640]"),
    },
    "analyze sliding-windows fc=runs/a conv=runs/b --out windows --difficulty runs/c --chunk 9 --seed 1": {
        "heads": ("fc=runs/a", "conv=runs/b"),
        "out": "windows",
        "difficulty": "runs/c",
        "chunk": 9,
        "seed": 1,
    },
    "analyze pearson fc=runs/a conv=runs/b --out pearson --background include": {"background": "include"},
    "analyze fc-weights runs/a --out weights": {"checkpoints": ("runs/a",), "out": "weights"},
    "analyze balance-weights --recipe shapes-ext --l-fc 0.7 1.0 --l-conv 0.8 1.0 --out grid --steps 9 --collect": {
        "recipe": "shapes-ext",
        "l_fc": (0.7, 1.0),
        "l_conv": (0.8, 1.0),
        "steps": 9,
        "collect": True,
    },
    f"analyze feature-correlation runs/ext --out maps --device cpu {DATA}": {"checkpoints": ("runs/ext",)},
    "analyze qualitative runs/ext --out pictures --cases 2": {"checkpoint": "runs/ext", "cases": 2},
    "tables": {"numbers": (), "format": "text"},
    "tables 1 4 --runs runs --format markdown --out t.md --miniature": {
        "numbers": (1, 4),
        "runs": "runs",
        "format": "markdown",
        "out": "t.md",
        "miniature": True,
    },
    "tables --smoke": {"smoke": True},
}


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_means_what_it_did(line, monkeypatch):
    options = options_of(line, monkeypatch)
    assert {path: value(options, path) for path in LINES[line]} == LINES[line]


def test_a_run_is_resumed_by_its_folder(tmp_path, monkeypatch):
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(RECIPES["bccd-small"])))
    options = options_of(f"train --resume {tmp_path} --train.steps 500", monkeypatch)
    assert options.resume == str(tmp_path) and options.train.steps == 500 and options.data.format == "voc"


def test_info_says_what_is_installed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["info"])
    importlib.import_module("doublehead.info").main()
    shown = capsys.readouterr().out
    assert shown.startswith("doublehead ") and "nms_padded" in shown and "torch " in shown


@pytest.mark.parametrize("command", ["train", "evaluate", "detect", "export", "convert", "analyze", "tables"])
def test_help_is_shown(command, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"doublehead.{command}").main(["--help"])
    assert stop.value.code == 0 and command in capsys.readouterr().out
