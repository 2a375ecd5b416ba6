"""What the tests of `doublehead export` share: a saved detector that finds something."""

from __future__ import annotations

import torch
from torchvision.models.resnet import BasicBlock, ResNet

from doublehead.config import Recipe
from doublehead.engine.checkpoint import save_model
from doublehead.models import build_detector
from tests.support.tiny_detectors import lively, tiny

CLASSES = ["cat", "dog", "bird"]

# Quick to compile, slow to run; without a trial build that tells whether the compiler knows vector instructions.
QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0", "cpp.simdlen": 1, "cpp.vec_isa_ok": False}


def half_resnet18(**options):
    """In place of torchvision's ResNet-18: of half its depth, which is exported in less time; no weights are read."""
    return ResNet(BasicBlock, [1, 1, 1, 1], **{name: value for name, value in options.items() if name != "weights"})


def save_tiny_ext(folder):
    """`folder`, with the checkpoint of an Ext detector."""
    torch.manual_seed(0)
    model = build_detector(tiny("double_head_ext"), num_classes=4)
    lively(model.detector)
    recipe = Recipe(name="tiny-ext", model=tiny("double_head_ext"))
    save_model(folder / "model.safetensors", model, recipe, CLASSES, [3, 5, 8])
    return folder
