"""Smoke test of a recipe: a few steps on small generated pictures, then one detection."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch

from doublehead.config import DataConfig, Recipe
from doublehead.data import build_dataset, build_loader
from doublehead.engine.distributed import World
from doublehead.engine.evaluator import predict_images
from doublehead.engine.optim import seed_step
from doublehead.engine.trainer import Hooks, Trainer
from doublehead.ops import NonLocalBlock

STEPS = 2
SIDE = 64


@dataclass(frozen=True)
class Smoke:
    """The result of a smoke test."""

    parameters: int
    losses: list[float]
    """Total loss of each step."""
    detections: int
    """Detections in one picture; the score threshold is 0, as two steps teach nothing."""
    seconds: float


def smoke_recipe(recipe: Recipe) -> Recipe:
    """`recipe` with its own heads, backbone, losses and optimiser, but small pictures, few RoIs and no downloads.

    From scratch the norms must be live: frozen ones without pretrained statistics let the activations explode.  Live
    ones need an epsilon.
    """
    model = recipe.model
    norm = "batch_norm" if model.backbone.norm == "frozen_batch_norm" else model.backbone.norm
    scratch = {"weights": None, "norm": norm, "norm_eps": model.backbone.norm_eps or 1e-5}
    few = {"pre_nms_train": 60, "pre_nms_test": 30, "post_nms_train": 30, "post_nms_test": 5}
    return replace(
        recipe,
        model=replace(
            model,
            backbone=replace(model.backbone, fpn_norm=model.backbone.neck == "fpn", **scratch),
            rpn=replace(model.rpn, samples=64, **few),
            roi=replace(model.roi, samples=6),
            detection=replace(model.detection, score_threshold=0.0),
            image=replace(model.image, min_size=(SIDE,), max_size=SIDE),
        ),
        data=DataConfig("shapes", train_images=8, val_images=1, image_size=SIDE, workers=0),
        train=replace(recipe.train, steps=STEPS, batch_size=2, milestones=(), warmup_steps=STEPS, log_every=1,
                      device="cpu"),
    )  # fmt: skip


def smoke(recipe: Recipe) -> Smoke:
    """Train `smoke_recipe(recipe)` and detect once; nothing is written.

    Raises:
        RuntimeError: a loss is not finite, a trained weight did not change, or nothing was detected.
    """
    begun = time.monotonic()
    recipe = smoke_recipe(recipe)
    training = build_dataset(recipe.data, "train", recipe.train.horizontal_flip)
    seed_step(recipe.train.seed, -1)
    from doublehead.models import build_detector  # only here: it brings torchvision

    model = build_detector(recipe.model, len(training.classes) + 1)
    before = [parameter.detach().clone() for parameter in model.detector.heads.parameters()]
    hooks = _Losses()

    def batches(start: int):
        return build_loader(training, recipe.train.batch_size, train=True, seed=0, workers=0, start_step=start)

    trainer = Trainer(model, recipe.train, batches, World(), hooks)
    trainer.fit()
    _check(recipe.name, hooks.losses, before, model)
    image, _ = build_dataset(recipe.data, "val")[0]
    (detections,) = predict_images(model, [image], torch.device("cpu"))
    if not len(detections["boxes"]) or not bool(torch.isfinite(detections["scores"]).all()):
        raise RuntimeError(f"{recipe.name}: no usable detection comes out, though every score is accepted")
    parameters = sum(p.numel() for p in model.parameters())
    return Smoke(parameters, hooks.losses, len(detections["boxes"]), time.monotonic() - begun)


class _Losses(Hooks):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, record: dict) -> None:
        self.losses.append(record["loss"])


def _check(name: str, losses: list[float], before: list[torch.Tensor], model: torch.nn.Module) -> None:
    if len(losses) != STEPS or not all(math.isfinite(loss) for loss in losses):
        raise RuntimeError(f"{name}: expected {STEPS} finite losses, got {losses}")
    heads = dict(model.detector.heads.named_parameters())
    still = [key for (key, now), old in zip(heads.items(), before, strict=True) if torch.equal(now.detach(), old)]
    # A bias before a batch norm is taken off again: it has no effect to learn from.
    blocks = [module for module in model.modules() if isinstance(module, NonLocalBlock)]
    useless = {id(block.out.bias) for block in blocks if block.norm is not None}
    frozen = [key for key in still if heads[key].requires_grad and id(heads[key]) not in useless]
    if frozen:
        raise RuntimeError(f"{name}: training changed nothing in {', '.join(frozen[:5])}")
