"""Writes `data/`: models, a stopped run and exported programs of one version, for later versions to read.

    python tests/compatibility/write_files.py FOLDER

The files in `data/` were written by doublehead 0.1.0, commit ee287a7, with torch 2.14.1.  They are evidence: do not
write them again with newer code.  Files of a later version go into a folder of their own.

A ResNet-18 has 11 million weights.  They repeat with a period of 127 values here: xz stores 45 MB in some kilobytes.
"""

import dataclasses
import json
import lzma
import math
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from doublehead import train
from doublehead.config import (
    BackboneConfig,
    DetectionConfig,
    HeadConfig,
    ImageConfig,
    ModelConfig,
    NonLocalConfig,
    Recipe,
    RoIConfig,
    RPNConfig,
    to_dict,
)
from doublehead.engine.checkpoint import load_model, save_model
from doublehead.engine.run import Run
from doublehead.exporting import onnx_file
from doublehead.exporting.description import describe
from doublehead.exporting.program import DetectorProgram, example_input
from doublehead.models import build_detector
from doublehead.ops import _library
from doublehead.recipes import RECIPES

CLASSES, CATEGORY_IDS = ["cat", "dog", "bird"], [3, 5, 8]
BACKBONE = BackboneConfig("resnet18", weights=None, frozen_stages=5, fpn_channels=3)
RPN = RPNConfig((8, 16, 32, 64, 128), pre_nms_train=60, pre_nms_test=60, post_nms_train=40, post_nms_test=30)
IMAGE = ImageConfig(min_size=(64,), max_size=96)
DETECTION = DetectionConfig(score_threshold=0.2, max_detections=20)

MODELS = {
    "ext": ModelConfig(
        BACKBONE,
        RPN,
        RoIConfig(samples=16),
        HeadConfig("double_head_ext", fc_dim=8, conv_dim=8, conv_blocks=3, non_local=NonLocalConfig(groups=2)),
        detection=dataclasses.replace(DETECTION, fusion="max", ext_gate=0.05),
        image=IMAGE,
    ),
    "legacy": ModelConfig(
        dataclasses.replace(BACKBONE, stride_in_1x1=True),
        dataclasses.replace(RPN, anchors="legacy", straddle=0.0),
        RoIConfig(samples=16, sampling_ratio=2, canonical_size=40.0, level_rule="maskrcnn_benchmark"),
        HeadConfig(
            "double_head", 8, 8, 3, non_local=NonLocalConfig(True, "embedded_gaussian", 1, True, False, inner_dim=6)
        ),
        detection=DETECTION,
        image=dataclasses.replace(
            IMAGE, mean=(102.9801, 115.9465, 122.7717), std=(1.0, 1.0, 1.0), channel_order="bgr",
            resize="maskrcnn_benchmark",
        ),
        legacy_boxes=True,
    ),
    "c4": ModelConfig(
        dataclasses.replace(BACKBONE, neck="none"),
        dataclasses.replace(RPN, anchor_sizes=(16, 32, 64), anchors="exact"),
        RoIConfig(samples=16, output_size=14, sampling_ratio=0, aligned=True, level_rule="detectron2"),
        HeadConfig("conv5", class_agnostic_boxes=True),
        detection=DETECTION,
        image=dataclasses.replace(IMAGE, resize="detectron2"),
    ),
}  # fmt: skip


def pictures(number: int = 2) -> list[torch.Tensor]:
    """Smooth random pictures, the same everywhere: whole numbers below 256, from integer arithmetic."""
    images = []
    for i in range(number):
        state, values = 12345 + i, []
        for _ in range(3 * 8 * 10):
            state = (1103515245 * state + 12345) % 2**31
            values.append(state >> 23)
        coarse = torch.tensor(values, dtype=torch.uint8).view(3, 8, 10)
        images.append(coarse.repeat_interleave(9, 1).repeat_interleave(9 + i, 2))
    return images


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Large weights repeat with a short period, small ones are random; norms and classifiers fit their inputs."""
    generator = torch.Generator().manual_seed(0)
    detector = model.detector
    for parameter in detector.parameters():
        if parameter.dim() > 1:
            number = parameter.numel()
            period = 127 if number > 2_500 else number
            values = torch.randn(period, generator=generator) * math.sqrt(2 / parameter[0].numel())
            parameter.copy_(values.half().float().repeat(-(-number // period))[:number].view_as(parameter))

    def fit_norm(norm, inputs):
        """One mean and one variance for all channels, as small in a file as the weights."""
        norm.running_mean.fill_(inputs[0].mean().half().item())
        norm.running_var.fill_(max(inputs[0].var().half().item(), 1e-3))

    def fit_layer(layer, inputs, outputs):
        scale = 2 / outputs.std(0).clamp(min=1e-3)
        layer.weight.mul_(scale[:, None])
        layer.bias.copy_(-outputs.mean(0) * scale)

    ext = model.config.head.kind == "double_head_ext"
    if ext:
        model.set_readout("fused", "max", 0.0)
    run_with_hooks(model, [(norm, fit_norm) for norm in model.modules() if hasattr(norm, "running_var")], before=True)
    detector.rpn.objectness.weight.mul_(8)
    layers = [layer for head in detector.heads.values() for layer in (head.classifier, head.regressor)]
    run_with_hooks(model, [(layer, fit_layer) for layer in layers if layer is not None])
    if ext:
        model.set_readout("fused", "max", 0.05)


def run_with_hooks(model: nn.Module, hooks: list, before: bool = False) -> None:
    handles = [
        module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
        for module, hook in hooks
    ]
    model(pictures())
    for handle in handles:
        handle.remove()


def detections(model: nn.Module) -> list[dict[str, list]]:
    with torch.inference_mode():
        found = model.eval()(pictures())
    for image in found:
        print(
            len(image["scores"]),
            "detections, least differences of scores",
            image["scores"].diff().abs().sort().values[:3],
        )
    return [{name: numbers(tensor) for name, tensor in image.items()} for image in found]


def numbers(tensor: torch.Tensor):
    """Nested lists; of float32 the nine digits that tell every value from its neighbours."""
    return json.loads(json.dumps(tensor.tolist()), parse_float=lambda text: float(f"{float(text):.9g}"))


def border_boxes() -> torch.Tensor:
    """Squares whose sides lie at and next to the borders between pyramid levels, in steps of float32 and wider."""
    steps = torch.tensor([-64.0, -32, -16, -12, -8, -4, -2, -1, 0, 1, 2, 4, 8, 12, 16, 32, 64], dtype=torch.float64)
    sides = torch.tensor([112.0, 224, 448], dtype=torch.float64)[:, None] * (1 + steps * 2**-23)
    sides = torch.cat([sides.flatten(), sides.flatten() - 1, sides.flatten() + 1]).float()
    zeros = torch.zeros_like(sides)
    return torch.stack([zeros, zeros, zeros, sides, sides], 1)


def levels(rule: int) -> list[int]:
    """The level of each box by a level rule's number: every pixel of a level's features holds the level."""
    features = [torch.full((1, 1, 256 >> level, 256 >> level), float(level)) for level in range(4)]
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    (pooled,) = torch.ops.doublehead.multiscale_roi_align(
        features, border_boxes(), scales, [1.0], [1, 1], 1, False, 224.0, 4, rule
    )
    return pooled.flatten().long().tolist()


def store(folder: Path, source: Path) -> None:
    (folder / f"{source.name}.xz").write_bytes(lzma.compress(source.read_bytes(), preset=6))
    source.unlink()


def write_json(path: Path, values) -> None:
    path.write_text(json.dumps(values) + "\n")


def write_models(folder: Path) -> dict[str, nn.Module]:
    expected, models = {}, {}
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = models[name] = build_detector(config, len(CLASSES) + 1).eval()
        fill(model)
        save_model(folder / f"{name}.safetensors", model, Recipe(name=name, model=config), CLASSES, CATEGORY_IDS, 7)
        expected[name] = detections(load_model(folder / f"{name}.safetensors").model)
        store(folder, folder / f"{name}.safetensors")
    torch.save(models["legacy"], folder / "legacy-whole.pt")
    store(folder, folder / "legacy-whole.pt")
    readouts = expected["ext-readouts"] = {}
    for readout, fusion in (
        ("fused", "complementary"),
        ("fused", "average"),
        ("split", "max"),
        ("fc", "max"),
        ("conv", "max"),
    ):
        models["ext"].set_readout(readout, fusion, 0.0)
        readouts[f"{readout} {fusion}"] = detections(models["ext"])
    models["ext"].set_readout("fused", "max", 0.05)
    write_json(folder / "detections.json", expected)
    store(folder, folder / "detections.json")
    return models


class Operators(nn.Module):
    """The operators that the detector's inference does not call, and RoIAlign by all four level rules."""

    def forward(self, features, rois, boxes, scores, groups, logits, deltas, x, picture):
        ours = torch.ops.doublehead
        outputs = []
        for rule in range(4):
            outputs += ours.multiscale_roi_align(
                features, rois, [0.25, 0.125], [1.0, 1.3], [2, 2], (2, 0)[rule % 2], rule in (1, 2), 56.0, 3, rule
            )
        outputs += [ours.nms(boxes[0], scores[0], None, 0.5), ours.nms(boxes[0], scores[0], groups[0], 0.3)]
        outputs += ours.nms_padded(boxes, scores, groups, 0.5, 6, 2)
        outputs += [ours.fuse_scores(logits[0], logits[1], method) for method in ("complementary", "max", "average")]
        valid, sizes = scores > 0.2, torch.tensor([[64.0, 90.0], [50.0, 96.0]])
        for fusion, least_side in (("max", 0.0), ("complementary", 1.0)):
            outputs += ours.detections(
                logits, deltas, boxes, valid, sizes, fusion, 0.1, 0.5, 7, 1e-2, least_side, [10.0, 10.0, 5.0, 5.0]
            )
        channels = x.shape[1]
        vector, weight = torch.linspace(-1, 1, channels), torch.linspace(-1, 1, channels * channels).view(channels, -1)
        rows = x.permute(0, 2, 3, 1).flatten(1, 2)
        outputs.append(ours.non_local_attention(torch.cat([rows, rows / 2, -rows], 2), 2, True, 0.5))
        outputs.append(ours.non_local_attention(torch.cat([rows, rows / 2, -rows], 2), 1, False, 0.25))
        flat, (height, width) = rows.flatten(0, 1), x.shape[2:]
        outputs += ours.batch_norm_act(flat, vector + 2, vector, flat / 2, True, 1e-5)
        outputs.append(ours.batch_norm_act_apply(flat, vector, vector + 2, vector + 1, vector, None, True))
        outputs.append(ours.fused_conv(flat, weight, vector, None, flat, None, [height, width], True, False))
        outputs.append(ours.fused_conv(flat, weight, None, None, None, None, [height, width], False, True))
        mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
        outputs.append(ours.image_batch([picture], [12, 14], 16, 16, mean, std, True, False, torch.float32, False))
        return outputs

    @staticmethod
    def inputs() -> tuple:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        corners = torch.rand(2, 12, 2, generator=generator) * 40
        boxes = torch.cat([corners, corners + 10 + torch.rand(2, 12, 2, generator=generator) * 30], 2)
        edges = torch.tensor([[0.0, 0, 56, 56], [3, 4, 58.999, 60], [3, 4, 58, 59], [3, 4, 59.001, 60], [5, 5, 33, 33]])
        rois = torch.cat([torch.zeros(5, 1), edges], 1)
        rois = torch.cat([rois, torch.cat([torch.ones(4, 1), boxes[1, :4]], 1)])
        features = [normal(2, 3, 16, 24), normal(2, 3, 8, 12)]
        groups = torch.randint(0, 3, (2, 12), generator=generator)
        picture = torch.randint(0, 256, (3, 10, 11), generator=generator).to(torch.uint8)
        logits = [2 * normal(2, 12, 4), 2 * normal(2, 12, 4)]
        scores = torch.rand(2, 12, generator=generator)
        return features, rois, boxes, scores, groups, logits, normal(2, 12, 4, 4), normal(2, 4, 3, 3), picture


def export(module: nn.Module, inputs: tuple, path: Path, keep_inputs: bool) -> list:
    """Write a program as `torch.export` makes it; its outputs for `inputs`."""
    with torch.no_grad():
        exported = torch.export.export(module, inputs)
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)  # of no use to a reader, and as long as all the rest
        node.meta.pop("nn_module_stack", None)
    if not keep_inputs:
        exported.example_inputs = tuple(map(torch.zeros_like, inputs)), {}
    torch.export.save(exported, path)
    names = sorted({str(node.target) for node in exported.graph.nodes if "doublehead" in str(node.target)})
    print(path.name, "calls", ", ".join(names))
    with torch.no_grad():
        return [numbers(tensor) for tensor in module(*inputs)]


def write_programs(folder: Path, models: dict[str, nn.Module]) -> None:
    expected, inputs = {}, example_input(2, 64, 96)
    program = DetectorProgram(models["ext"].detector)
    expected["ext.pt2"] = export(program, inputs, folder / "ext.pt2", keep_inputs=False)
    expected["operators.pt2"] = export(Operators(), Operators.inputs(), folder / "operators.pt2", keep_inputs=True)
    program = DetectorProgram(models["ext"].detector, plain=True)
    recipe = Recipe(name="ext", model=MODELS["ext"])
    note = describe("onnx", recipe, CLASSES, CATEGORY_IDS, inputs[0].shape, "cpu")
    onnx_file.write_onnx(program, inputs, note, folder / "ext.onnx")
    with torch.no_grad():  # this seed: here onnxruntime, which suppresses in float32, finds the same
        expected["ext.onnx"] = [numbers(tensor) for tensor in program(*example_input(2, 64, 96, seed=9))]
    for name in expected:
        store(folder, folder / name)
    write_json(folder / "programs.json", expected)
    store(folder, folder / "programs.json")


def write_run(folder: Path) -> None:
    """A run that was stopped after two of its four steps, and the log of one that was not."""
    start = build_detector(MODELS["ext"], 7)
    fill(start.eval())
    save_model(
        folder / "start.safetensors", start, Recipe(name="start", model=MODELS["ext"]), list("abcdef"), list(range(6))
    )
    options = (
        "shapes-ext --data.train-images 8 --data.val-images 2 --data.image-size 64 --data.workers 0 "
        "--train.batch-size 2 --train.steps 4 --train.milestones 3 --train.warmup-steps 1 --train.log-every 1 "
        "--train.checkpoint-every 1 --train.no-channels-last --train.device cpu --train.optimizer sgd "
        "--train.lr 0.002 --model.backbone.weights start.safetensors --model.backbone.norm frozen_batch_norm "
        "--model.backbone.frozen-stages 5 --model.backbone.fpn-channels 3 --model.backbone.no-fpn-norm "
        "--model.roi.samples 16 --model.head.fc-dim 8 --model.head.conv-dim 8 --model.head.non-local.groups 2"
    ).split()
    os.chdir(folder)
    train.main([*options, "--out", "whole"])

    advance = Run.on_step

    def stop(run):
        advance(run)
        if run.trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    Run.on_step = stop
    try:
        train.main([*options, "--out", "run"])
    except SystemExit as end:
        print("stopped with", end.code)
    for name in ("model.safetensors", "state.pt"):
        store(folder / "run", folder / "run" / name)


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    target.mkdir(parents=True)
    write_json(
        target / "operators.json",
        {n: str(getattr(torch.ops.doublehead, n).default._schema) for n in sorted(_library.SCHEMAS)},
    )
    write_json(target / "recipes.json", {name: to_dict(recipe) for name, recipe in RECIPES.items()})
    store(target, target / "recipes.json")
    write_json(target / "levels.json", [levels(rule) for rule in range(4)])
    write_programs(target, write_models(target))
    write_run(target)
