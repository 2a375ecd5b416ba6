"""The configuration of everything, as plain dataclasses.

This module is a leaf: it imports nothing of the library, so the models, the engine and the
command lines may all read it.  A `Recipe` is complete: together with a data set it says
everything needed to train, evaluate and rebuild a detector.  `to_dict` / `from_dict` carry it
through JSON, which is how a checkpoint remembers it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

HeadKind = Literal[
    "fc", "conv", "double_fc", "double_conv", "double_head", "double_head_reverse", "double_head_ext", "conv5"
]
Norm = Literal["frozen_batch_norm", "batch_norm", "group_norm"]
Fusion = Literal["complementary", "max", "average", "none"]
ReadOutName = Literal["fused", "split", "fc", "conv"]


@dataclass(frozen=True)
class BackboneConfig:
    """ResNet (torchvision's modules), with a feature pyramid or cut before its last stage."""

    name: Literal["resnet18", "resnet50", "resnet101"] = "resnet50"
    norm: Norm = "frozen_batch_norm"
    """`frozen_batch_norm` for pretrained weights; `batch_norm` or `group_norm` from scratch."""
    norm_eps: float = 1e-5
    """Of the batch norms (torchvision's COCO_V1 detectors need 0)."""
    weights: str | None = "imagenet"
    """`imagenet` (torchvision downloads them), the path of a ResNet's weights (torchvision's, timm's, Detectron2's or
    Caffe2's names: .pth, .pkl, .safetensors), a detector's model.safetensors (its backbone and pyramid are taken), or
    None: from scratch."""
    frozen_stages: int = 2
    """How many of stem, layer1 .. layer4 are not trained (2: stem and layer1)."""
    fpn_channels: int = 256
    fpn_norm: bool = False
    """Normalise the pyramid's convolutions too: what a detector trained from scratch needs (He et al. 2019)."""
    stride_in_1x1: bool = False
    """Where a bottleneck halves its map: in its first 1x1 convolution (Detectron2, maskrcnn-benchmark) or its 3x3."""
    neck: Literal["fpn", "none"] = "fpn"
    """`fpn`: maps P2 .. P6; `none`: C4 alone, for head.kind `conv5`."""


@dataclass(frozen=True)
class RPNConfig:
    """Region proposal network (Ren et al. 2015, on a pyramid)."""

    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512)
    """One anchor side in pixels for each pyramid level P2, P3, ...; without a pyramid all of them on its one map."""
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    anchors: Literal["rounded", "exact", "legacy"] = "rounded"
    """Sides rounded to pixels (torchvision), exact (Detectron2, MMDetection), or rounded about the centre of a cell's
    first pixels (maskrcnn-benchmark); see `doublehead.models.anchors`."""
    positive_iou: float = 0.7
    negative_iou: float = 0.3
    samples: int = 256
    """Anchors sampled per image for the loss."""
    positive_fraction: float = 0.5
    pre_nms_train: int = 2000
    """Candidates kept per level before NMS."""
    pre_nms_test: int = 1000
    post_nms_train: int = 1000
    """Proposals kept per image (the release keeps 2000 per batch of two images)."""
    post_nms_test: int = 1000
    nms_iou: float = 0.7
    min_size: float = 1e-3
    smooth_l1_beta: float = 1 / 9
    straddle: float = -1.0
    """In training, ignore anchors that reach more than so many pixels over their image's border (maskrcnn-benchmark and
    the authors' release: 0).  Negative: learn from all of them (Detectron2, torchvision, MMDetection)."""


@dataclass(frozen=True)
class RoIConfig:
    """Sampling of RoIs in training, and pooling."""

    samples: int = 512
    positive_fraction: float = 0.25
    positive_iou: float = 0.5
    output_size: int = 7
    sampling_ratio: int = 2
    """Samples per bin and axis; 0: as many as the bin is long (adaptive)."""
    aligned: bool = False
    canonical_size: float = 224.0
    """Square root of the box area that belongs to level P4."""
    level_rule: Literal["torchvision", "detectron2", "mmdet", "maskrcnn_benchmark"] = "torchvision"
    """Rounding of the level next to powers of two; the projects differ (see `multiscale_roi_align`)."""
    fc_box_scale: float = 1.0
    conv_box_scale: float = 1.3
    """The conv-head pools boxes enlarged by this factor (authors' release; 1.0 is the text)."""
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)


@dataclass(frozen=True)
class NonLocalConfig:
    """Non-local block (Wang et al. 2018); the defaults are the authors' release."""

    enabled: bool = True
    pairwise: Literal["dot_product", "embedded_gaussian"] = "dot_product"
    groups: int = 4
    scale: bool = False
    """Divide the logits of `embedded_gaussian` by sqrt(channels per group)."""
    relu_after: bool = True
    inner_dim: int | None = None
    """Width of theta, phi and g, a multiple of `groups`; None: half of `conv_dim`."""


@dataclass(frozen=True)
class HeadConfig:
    """The heads: which kinds, how wide, how deep (PAPER Figure 1, Tables 1 and 2).

    `conv5` is the head of a backbone without a pyramid: the ResNet's last stage, which has its own width and depth.
    """

    kind: HeadKind = "double_head_ext"
    fc_dim: int = 1024
    conv_dim: int = 1024
    conv_blocks: int = 5
    """K of Table 2.  With non-local blocks K is odd: (K+1)/2 residual, (K-1)/2 non-local."""
    shortcut_relu: bool = False
    """ReLU after the first block's shortcut.  The paper, its release and MMDetection 3 have none."""
    non_local: NonLocalConfig = field(default_factory=NonLocalConfig)
    fused: bool = True
    """Run the conv-head by fused operators (the same results); False: module by module."""
    recompute: bool = False
    """In training remember only the inputs of residual blocks: less memory, a third more work in them."""
    class_agnostic_boxes: bool = False
    """One box regressor for all classes; False: one for each (the paper and its release)."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of Equations 1-3."""

    w_fc: float = 2.0
    w_conv: float = 2.5
    l_fc: float = 0.7
    l_conv: float = 0.8
    smooth_l1_beta: float = 1.0


@dataclass(frozen=True)
class DetectionConfig:
    """From head outputs to detections."""

    readout: ReadOutName = "fused"
    """Of Ext: `fused` classes + conv boxes, `split` fc classes + conv boxes, or `fc` / `conv` alone."""
    fusion: Fusion = "complementary"
    """How `fused` joins the two classifiers; `none` takes the fc-head's."""
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    max_detections: int = 100
    min_size: float = 1e-2
    skip: bool = True
    """Run the head that only gives boxes on those RoIs alone whose classes pass the score threshold (exact)."""
    ext_gate: float = 0.0
    """Of Ext, fused: drop RoIs whose largest foreground fc-score is not above this, before the conv-head sees them.
    Faster, but approximate: the conv-head's classifier alone may have passed them.  0: off."""


@dataclass(frozen=True)
class ImageConfig:
    """Resizing and normalisation, done inside the model."""

    min_size: tuple[int, ...] = (800,)
    """Short side in pixels; several: one is drawn per image in training, the last is used at test."""
    max_size: int = 1333
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    size_divisible: int = 32
    channel_order: Literal["rgb", "bgr"] = "rgb"
    """The order in which the network wants the channels, and in which `mean` and `std` are given; images are RGB."""
    resize: Literal["torchvision", "detectron2", "mmdet", "maskrcnn_benchmark"] = "torchvision"
    """Whose way to round the new size and to interpolate; see `doublehead.models.images`."""


@dataclass(frozen=True)
class ModelConfig:
    """The detector.  The number of classes comes from the data set."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    rpn: RPNConfig = field(default_factory=RPNConfig)
    roi: RoIConfig = field(default_factory=RoIConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    legacy_boxes: bool = False
    """Boxes were learnt as (first pixel, last pixel), a box's width being x2 - x1 + 1 (maskrcnn-benchmark, the authors'
    release).  Everywhere here they end at x2 + 1, so that widths are differences; what remains of the convention is
    that a box clipped to the image keeps one pixel, and that a RoI is sampled up to its last pixel's coordinate."""


@dataclass(frozen=True)
class DataConfig:
    """Where images and boxes come from."""

    format: Literal["shapes", "coco", "voc"] = "shapes"
    root: str | None = None
    """Folder of the data set; `shapes` is generated and needs none."""
    train_split: str = "train"
    """coco: `instances_<split>.json` and folder `<split>`; voc: `ImageSets/Main/<split>.txt`; shapes: any."""
    val_split: str = "val"
    train_images: int | None = None
    """Use only the first N images of the split (shapes: generate N)."""
    val_images: int | None = None
    image_size: int = 128
    """Side of a generated image (shapes only)."""
    on_bad_record: Literal["error", "skip"] = "error"
    """What to do with a broken image or annotation: stop with its name, or leave it out and count it."""
    max_skipped: float = 0.1
    """Of `skip`: the largest share of the images, and of the objects, that may be left out (three always may, but with
    0 none)."""
    background: Literal["drop", "keep"] = "drop"
    """Training images without any object: leave them out, as the paper does, or learn from them as well."""
    max_pixels: int = 100_000_000
    """Refuse larger images, before they are decoded; at most 178,956,970, where Pillow refuses in any case."""
    outside_root: bool = False
    """Read images whose names in the annotations (absolute, or with `..`) lead out of the data set's folder;
    symbolic links are followed in any case."""
    workers: int = 2
    """Loader processes per rank."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    steps: int = 180_000
    """On the command line, without milestones: the schedule (milestones, warm-up) is scaled to this length."""
    batch_size: int = 8
    """Images per optimizer step, over all ranks and accumulation steps."""
    accumulate: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd` is the paper's; `adamw` gets further in a few hundred steps from scratch."""
    lr: float = 0.01
    momentum: float = 0.9
    """Of `adamw`, the first beta."""
    weight_decay: float = 1e-4
    bias_lr_factor: float = 2.0
    """Biases: this times the learning rate, no weight decay."""
    milestones: tuple[int, ...] = (120_000, 160_000)
    gamma: float = 0.1
    warmup_steps: int = 500
    warmup_factor: float = 1 / 3
    clip_grad_norm: float | None = None
    amp: Literal["off", "bf16", "fp16"] = "off"
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights and evaluate it."""
    sync_batch_norm: bool = False
    channels_last: bool = True
    horizontal_flip: float = 0.5
    aspect_ratio_grouping: bool = True
    eval_every: int = 0
    """Evaluate each N steps; 0: only at the end."""
    checkpoint_every: int = 1000
    log_every: int = 20
    seed: int = 0
    device: str = "auto"
    """`auto`: CUDA where there is one, else CPU."""


@dataclass(frozen=True)
class Recipe:
    """One complete configuration."""

    name: str = "custom"
    about: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested plain dicts, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], cls: type = Recipe) -> Any:
    """Rebuild what `to_dict` gave; fields that are left out have their defaults.

    Raises:
        ValueError: a key that `cls` does not have (a newer or foreign file), or a value that its field cannot have,
            named in full.
    """
    return _rebuild(values, cls, "")


def _rebuild(value: Any, hint: Any, name: str) -> Any:
    """`value`, as JSON has it, as `hint` wants it: lists become tuples, 2.0 is a whole number and 2 a fraction."""
    if dataclasses.is_dataclass(hint):
        return _rebuild_fields(value, hint, name)
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        for option in options[:-1]:
            with contextlib.suppress(ValueError):
                return _rebuild(value, option, name)
        return value if value is None and type(None) in options else _rebuild(value, options[0], name)
    if kind is Literal:
        if type(value) is str and value in options:
            return value
        raise _not_accepted(name, value, "one of " + ", ".join(map(str, options)))
    if kind is tuple:
        count = None if options[-1] is Ellipsis else len(options)
        if not isinstance(value, (list, tuple)) or count not in (None, len(value)):
            raise _not_accepted(name, value, "a list" if count is None else f"a list of {count}")
        return tuple(_rebuild(item, options[0], f"{name}[{index}]") for index, item in enumerate(value))
    if hint is int and type(value) is float and value.is_integer():
        value = int(value)
    right = (int, float) if hint is float else (hint,)
    if type(value) not in right or (hint in (int, float) and not abs(value) < _LARGEST):
        raise _not_accepted(name, value, _WORDS[hint])
    return value


def _rebuild_fields(values: Any, cls: type, name: str) -> Any:
    if not isinstance(values, dict):
        raise _not_accepted(name or cls.__name__, values, f"a dictionary of {cls.__name__} fields")
    hints = typing.get_type_hints(cls)
    unknown = sorted(ascii(key)[1:-1] for key in set(values) - set(hints))
    if unknown:
        raise ValueError(f"unknown {cls.__name__} fields: {', '.join(unknown)}; known are: {', '.join(hints)}")
    start = f"{name}." if name else ""
    return cls(**{field: _rebuild(value, hints[field], start + field) for field, value in values.items()})


def _not_accepted(name: str, value: Any, accepted: str) -> ValueError:
    shown = repr(value) if type(value) is not int or abs(value) < _LARGEST else "a huge number"
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return ValueError(f"{name} is {shown}, {accepted} is accepted")


_LARGEST = 2**63  # no field means anything near it; and NaN is not below it
_WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", type(None): "nothing"}
