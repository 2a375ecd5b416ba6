"""What batch norms do to a young conv-head: the scale they start with, and statistics that run behind.

python evidence/conv_norms.py CHECKPOINT [--steps 240] [--seeds 0 1 2] [--out FILE]

On RoIs of a frozen detector (any run's model.safetensors) it trains an fc-head and two conv-heads for both tasks: one
whose norms' scales start at 1, PyTorch's default since 1.2, and one where they are drawn from 0 .. 1, the default of
the release's PyTorch 1.0.  On validation RoIs it then reads each with its running statistics, and with statistics
computed again from training RoIs at rest, which running ones follow with a delay.  Writes a JSON file, after each head;
the same command goes on behind those that are in it.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from doublehead.analysis.provenance import provenance
from doublehead.config import LossConfig, ModelConfig, TrainConfig
from doublehead.data import DetectionDataset, build_loader
from doublehead.data.opening import open_splits
from doublehead.engine.checkpoint import load_model
from doublehead.engine.optim import build_optimizer, learning_rate, seed_step, set_learning_rate
from doublehead.engine.schedule import scaled
from doublehead.models import DoubleHeadRCNN
from doublehead.models.heads import Heads
from doublehead.models.losses import head_losses, sample_rois
from doublehead.models.structures import RoISamples
from doublehead.ops.boxes import box_iou, decode_boxes

BATCHES, VALIDATION = 60, 15
"""Batches of images whose RoIs are kept for training and validation."""
HEADS = {"fc": ("fc", "ones"), "conv": ("conv", "ones"), "conv, norms' scales from 0 .. 1": ("conv", "uniform")}


class Batch(NamedTuple):
    """RoIs of some images."""

    pooled: dict[float, Tensor]
    rois: RoISamples


@torch.no_grad()
def batches(model: DoubleHeadRCNN, dataset: DetectionDataset, number: int, images: int) -> Iterator[Batch]:
    """RoIs of `number` times so many images, as a training would sample them; the model is in evaluation mode."""
    detector = model.detector
    for step, (pictures, targets) in zip(range(number), build_loader(dataset, images, train=True), strict=False):
        seed_step(0, step)
        batch, after = model.transform(pictures)
        truth = model.transform.targets(targets, [tuple(picture.shape[-2:]) for picture in pictures], after)
        features = detector.backbone(batch.pixels)
        rois = sample_rois(detector.rpn(batch, features)[0], truth, model.config.roi)
        yield Batch(detector.roi_pooling(features, rois.boxes), rois)


def fresh(config: ModelConfig, scales: str, channels: int, classes: int, seed: int) -> Heads:
    torch.manual_seed(seed)
    heads = Heads(config.head, config.roi, channels, classes)
    for layer in heads.modules():
        if isinstance(layer, nn.BatchNorm2d) and scales == "uniform":
            nn.init.uniform_(layer.weight)
    return heads.to(memory_format=torch.channels_last)


def train(heads: Heads, training: list[Batch], config: ModelConfig, schedule: TrainConfig) -> Iterator[tuple[int, str]]:
    """Train in place; says when to look: in the middle of the full rate, at its end, and at the end of all."""
    full = schedule.milestones[0]
    looks = {full // 3: "full rate", full: "end of the full rate", schedule.steps: "end"}
    optimizer = build_optimizer(heads, schedule)
    for step in range(schedule.steps):
        pooled, rois = training[step % len(training)]
        heads.train()
        set_learning_rate(optimizer, learning_rate(step, schedule))
        optimizer.zero_grad()
        sum(head_losses(heads(pooled), rois, config).values()).backward()
        if schedule.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(heads.parameters(), schedule.clip_grad_norm)
        optimizer.step()
        if step + 1 in looks:
            yield step + 1, looks[step + 1]


@torch.no_grad()
def with_statistics_at_rest(heads: Heads, training: list[Batch]) -> Heads:
    """A copy whose norms have the mean statistics of the training RoIs, at the weights of now."""
    heads = copy.deepcopy(heads).train()
    for layer in heads.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the mean of all batches
    for pooled, _ in training:
        heads(pooled)
    return heads.eval()


@torch.no_grad()
def read(heads: Heads, validation: list[Batch], config: ModelConfig) -> dict[str, float]:
    """Losses, and the mean IoU with its object of each positive RoI's regressed box, of heads of one branch."""
    heads = copy.deepcopy(heads).eval()
    ious, classes, boxes = [], 0.0, 0.0
    for pooled, rois in validation:
        outputs = heads(pooled)
        ((_, output),) = outputs.items()
        of_classes, of_boxes = head_losses(outputs, rois, config).values()
        classes, boxes = classes + of_classes.item() / len(validation), boxes + of_boxes.item() / len(validation)
        labels, matched = rois.labels.flatten(), rois.matched_boxes.flatten(0, 1)
        positive = (rois.valid.flatten() & (labels > 0)).nonzero()[:, 0]
        deltas = output.deltas[positive, labels[positive]]
        moved = decode_boxes(deltas, rois.boxes.flatten(0, 1)[positive], config.roi.box_weights)
        ious.append(box_iou(moved[:, None], matched[positive, None])[:, 0, 0])
    return {"iou": torch.cat(ious).mean().item(), "loss_cls": classes, "loss_reg": boxes}


def results(checkpoint: Path, steps: int, missing: list[tuple[int, str]]) -> Iterator[list[dict[str, Any]]]:
    """What each of the `missing` heads, (seed, name), came to."""
    loaded = load_model(checkpoint)
    recipe, model = loaded.recipe, loaded.model
    splits = open_splits(recipe.data, classes=loaded.classes)
    images = recipe.train.batch_size
    training = list(batches(model, splits.train, BATCHES, images))
    validation = list(batches(model, splits.val, VALIDATION, images))
    schedule = scaled(replace(recipe.train, steps=steps, epochs=None), recipe.train.steps)
    channels = next(iter(training[0].pooled.values())).shape[1]
    for seed, name in missing:
        kind, scales = HEADS[name]
        head = replace(model.config.head, kind=kind)
        config = replace(model.config, head=head, loss=LossConfig(w_fc=1.0, w_conv=1.0))
        heads, rows = fresh(config, scales, channels, model.num_classes, seed), []
        for step, when in train(heads, training, config, schedule):
            row = {"head": name, "seed": seed, "step": step, "when": when}
            rows.append(row | {"statistics": "running"} | read(heads, validation, config))
            if kind == "conv":
                again = with_statistics_at_rest(heads, training)
                rows.append(row | {"statistics": "at rest"} | read(again, validation, config))
        yield rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "records" / "conv_norms.json")
    options = parser.parse_args()
    seeds = " ".join(map(str, options.seeds))
    command = f"python evidence/conv_norms.py {options.checkpoint} --steps {options.steps} --seeds {seeds}"
    saved = json.loads(options.out.read_text()) if options.out.exists() else {"command": command}
    if saved["command"] != command:
        parser.error(f"{options.out} is of another command: {saved['command']}")
    rows, begun = saved.get("results", []), time.monotonic() - saved.get("seconds", 0.0)
    done = {(row["seed"], row["head"]) for row in rows}
    missing = [(seed, name) for seed in options.seeds for name in HEADS if (seed, name) not in done]
    for found in results(options.checkpoint, options.steps, missing) if missing else ():
        rows += [{key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()} for row in found]
        print(*map(json.dumps, rows[-len(found) :]), sep="\n", flush=True)
        record = {
            "what": __doc__.partition("\n")[0],
            **provenance(),
            "command": command,
            "seeds": options.seeds,
            "seconds": round(time.monotonic() - begun, 1),
            "results": rows,
        }
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
