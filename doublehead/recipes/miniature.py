"""The paper in miniature: all head kinds on generated pictures, a few minutes each on one core.

The paper starts every detector from the same ImageNet ResNet; these all start from the backbone of the demonstration,
`doublehead train shapes-ext --out runs/miniature/start`.  Its batch norms, stem and first stage stay frozen,
as in the paper.
"""

from __future__ import annotations

from dataclasses import replace

from doublehead.config import DataConfig, HeadKind, LossConfig, ModelConfig, Recipe

from .small import SHAPES_ANCHORS, SMALL_TRAINING, small_model

START_FOLDER = "runs/miniature/start"
START = f"{START_FOLDER}/model.safetensors"
MINIATURES: dict[HeadKind, str] = {
    "fc": "miniature-fc",
    "conv": "miniature-conv",
    "double_fc": "miniature-double-fc",
    "double_conv": "miniature-double-conv",
    "double_head_reverse": "miniature-double-head-reverse",
    "double_head": "miniature-double-head",
    "double_head_ext": "miniature-double-head-ext",
}
"""Head kind -> recipe name."""


def miniature_recipes() -> list[Recipe]:
    """One recipe for each head kind; they differ in the heads and, for single heads, the loss weight (Table 1)."""
    return [
        Recipe(
            name,
            f"the paper in miniature: {kind} on generated shapes; first: shapes-ext --out {START_FOLDER}",
            _model(kind),
            DataConfig("shapes", train_images=2000, val_images=400),
            replace(SMALL_TRAINING, milestones=(350, 440), warmup_steps=25),
        )
        for kind, name in MINIATURES.items()
    ]


def _model(kind: HeadKind) -> ModelConfig:
    model = small_model(128, 128, SHAPES_ANCHORS)
    single = kind in ("fc", "conv")
    return replace(
        model,
        backbone=replace(model.backbone, norm="frozen_batch_norm", weights=START, frozen_stages=2),
        head=replace(model.head, kind=kind),
        loss=LossConfig(w_fc=1.0, w_conv=1.0) if single else LossConfig(),
    )
