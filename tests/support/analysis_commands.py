"""What the tests of the figures share: a small untrained detector's checkpoint, and how a command fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from doublehead.cli.analyze import main
from doublehead.config import DetectionConfig
from doublehead.engine import checkpoint
from doublehead.models import build_detector
from doublehead.recipes import RECIPES

CLASSES = ["cat", "dog"]


def saved(folder, kind="double_head_ext", size=3):
    """A small untrained detector's checkpoint."""
    recipe = RECIPES["shapes-ext"]
    head = replace(recipe.model.head, kind=kind, fc_dim=8, conv_dim=16)
    model = replace(
        recipe.model, head=head, detection=DetectionConfig(), roi=replace(recipe.model.roi, output_size=size)
    )
    torch.manual_seed(0)
    detector = build_detector(model, 3)
    folder.mkdir()
    recipe = replace(recipe, model=model)
    checkpoint.save_model(folder / "model.safetensors", detector, recipe, CLASSES, [1, 2])
    return detector


def failure(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err
