"""The fields of every configuration, their defaults, and beside each field the values it accepts.

`codec` reads these annotations, whichever way a value comes.  A bound refuses what can never work; what depends on
another field is checked where the two are used.  Bounds stand outside of `| None`, for tyro's messages name the types
inside of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from .bounds import Bounds, NotEmpty

Count = Annotated[int, Bounds(least=1)]
CountOrZero = Annotated[int, Bounds(least=0)]
Positive = Annotated[float, Bounds(above=0)]
NonNegative = Annotated[float, Bounds(least=0)]
NonZero = Annotated[float, Bounds(zero=False)]
Fraction = Annotated[float, Bounds(least=0, most=1)]
BelowOne = Annotated[float, Bounds(least=0, below=1)]
CountOrNone = Annotated[int | None, Bounds(least=1)]

MAX_PIXELS = 100_000_000
"""Larger images are refused unless asked for; a photo of 100 megapixels decodes to 300 MB."""
MOST_PIXELS = 178_956_970
"""Pillow refuses larger images in any case (twice its MAX_IMAGE_PIXELS)."""
MOST_IMAGES = 65536
"""Images of an optimizer step: a larger batch is a typing error; reading its images would take hours."""

HeadKind = Literal[
    "fc", "conv", "double_fc", "double_conv", "double_head", "double_head_reverse", "double_head_ext", "conv5"
]
Norm = Literal["frozen_batch_norm", "batch_norm", "group_norm"]
DataFormat = Literal["shapes", "auto", "coco", "voc", "yolo", "labelme"]
Fusion = Literal["complementary", "max", "average", "none"]
ReadOutName = Literal["fused", "split", "fc", "conv"]
ReadOut = ReadOutName  # its former name
Precision = Literal["fp32", "bf16", "fp16", "int8"]
"""In which a trained detector computes; no field of a recipe."""


@dataclass(frozen=True)
class BackboneConfig:
    """ResNet (torchvision's modules), with a feature pyramid or cut before its last stage."""

    name: Literal["resnet18", "resnet50", "resnet101"] = "resnet50"
    norm: Norm = "frozen_batch_norm"
    """`frozen_batch_norm` for pretrained weights; `batch_norm` or `group_norm` from scratch."""
    norm_eps: NonNegative = 1e-5
    """Epsilon of the batch norms (torchvision's COCO_V1 detectors need 0)."""
    weights: str | None = "imagenet"
    """`imagenet` (torchvision downloads them), the path of a ResNet's weights (torchvision's, timm's, Detectron2's or
    Caffe2's names: .pth, .pkl, .safetensors), a detector's model.safetensors (its backbone and pyramid are taken), or
    None: from scratch."""
    frozen_stages: Annotated[int, Bounds(least=0, most=5)] = 2
    """How many of stem, layer1 .. layer4 stay frozen (2: stem and layer1)."""
    fpn_channels: CountOrZero = 256
    fpn_norm: bool = False
    """Normalise the pyramid's convolutions too: what a detector trained from scratch needs (He et al. 2019)."""
    stride_in_1x1: bool = False
    """Where a bottleneck halves its map: True: in its first 1x1 convolution (Detectron2, maskrcnn-benchmark); False: in
    its 3x3."""
    neck: Literal["fpn", "none"] = "fpn"
    """`fpn`: maps P2 .. P6; `none`: C4 alone, for head.kind `conv5`."""


@dataclass(frozen=True)
class RPNConfig:
    """Region proposal network (Ren et al. 2015, on a pyramid)."""

    anchor_sizes: Annotated[tuple[Positive, ...], NotEmpty()] = (32, 64, 128, 256, 512)
    """One anchor side in pixels for each pyramid level P2, P3, ...; without a pyramid all of them on its one map."""
    aspect_ratios: Annotated[tuple[Positive, ...], NotEmpty()] = (0.5, 1.0, 2.0)
    anchors: Literal["rounded", "exact", "legacy"] = "rounded"
    """Sides rounded to pixels (torchvision), exact (Detectron2, MMDetection), or rounded about the centre of a cell's
    first pixels (maskrcnn-benchmark); see `doublehead.models.anchors`."""
    positive_iou: float = 0.7
    negative_iou: float = 0.3
    samples: CountOrZero = 256
    """Anchors sampled per image for the loss."""
    positive_fraction: NonNegative = 0.5
    pre_nms_train: CountOrZero = 2000
    """Candidates kept per level before NMS."""
    pre_nms_test: CountOrZero = 1000
    post_nms_train: CountOrZero = 1000
    """Proposals kept per image (the release keeps 2000 per batch of two images)."""
    post_nms_test: CountOrZero = 1000
    nms_iou: float = 0.7
    min_size: float = 1e-3
    smooth_l1_beta: NonNegative = 1 / 9
    straddle: float = -1.0
    """In training, ignore anchors that reach more than so many pixels over their image's border (maskrcnn-benchmark and
    the authors' release: 0).  Negative: learn from all of them (Detectron2, torchvision, MMDetection)."""


@dataclass(frozen=True)
class RoIConfig:
    """Sampling of RoIs in training, and pooling."""

    samples: Count = 512
    positive_fraction: NonNegative = 0.25
    positive_iou: float = 0.5
    output_size: Count = 7
    sampling_ratio: int = 2
    """Samples per bin and axis; 0: as many as the bin is long (adaptive)."""
    aligned: bool = False
    canonical_size: float = 224.0
    """Square root of the box area that belongs to level P4."""
    level_rule: Literal["torchvision", "detectron2", "mmdet", "maskrcnn_benchmark"] = "torchvision"
    """The project whose rounding of a RoI's pyramid level to use; see `multiscale_roi_align`."""
    fc_box_scale: Positive = 1.0
    conv_box_scale: Positive = 1.3
    """The conv-head pools boxes enlarged by this factor (authors' release; 1.0 is the text)."""
    box_weights: tuple[NonZero, NonZero, NonZero, NonZero] = (10.0, 10.0, 5.0, 5.0)


@dataclass(frozen=True)
class NonLocalConfig:
    """Non-local block (Wang et al. 2018); the defaults are the authors' release."""

    enabled: bool = True
    pairwise: Literal["dot_product", "embedded_gaussian"] = "dot_product"
    groups: CountOrZero = 4
    scale: bool = False
    """Divide the logits of `embedded_gaussian` by sqrt(channels per group)."""
    relu_after: bool = True
    inner_dim: Annotated[int | None, Bounds(least=0)] = None
    """Width of theta, phi and g, a multiple of `groups`; None: half of `conv_dim`."""


@dataclass(frozen=True)
class HeadConfig:
    """The heads: which kinds, how wide, how deep (PAPER Figure 1, Tables 1 and 2).

    `conv5` is the head of a backbone without a pyramid: the ResNet's last stage, which has its own width and depth.
    """

    kind: HeadKind = "double_head_ext"
    fc_dim: CountOrZero = 1024
    conv_dim: CountOrZero = 1024
    conv_blocks: CountOrZero = 5
    """K of Table 2.  With non-local blocks K is odd: (K+1)/2 residual, (K-1)/2 non-local."""
    shortcut_relu: bool = False
    """ReLU after the first block's shortcut.  The paper, its release and MMDetection 3 have none."""
    non_local: NonLocalConfig = field(default_factory=NonLocalConfig)
    fused: bool = True
    """Run the conv-head by fused operators (the same results); False: module by module."""
    recompute: bool = False
    """In training keep only the inputs of residual blocks and recompute the rest: less memory, a third more work."""
    class_agnostic_boxes: bool = False
    """One box regressor for all classes; False: one for each (the paper and its release)."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of Equations 1-3."""

    w_fc: float = 2.0
    w_conv: float = 2.5
    l_fc: float = 0.7
    l_conv: float = 0.8
    smooth_l1_beta: NonNegative = 1.0


@dataclass(frozen=True)
class DetectionConfig:
    """From head outputs to detections."""

    readout: ReadOutName = "fused"
    """For Double-Head-Ext: `fused` classes + conv boxes, `split` fc classes + conv boxes, or `fc` / `conv` alone."""
    fusion: Fusion = "complementary"
    """How `fused` joins the two classifiers; `none` takes the fc-head's."""
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    max_detections: CountOrZero = 100
    min_size: float = 1e-2
    skip: bool = True
    """Run the head that only gives boxes on those RoIs alone whose classes pass the score threshold (exact)."""
    ext_gate: BelowOne = 0.0
    """Double-Head-Ext with read-out `fused`: drop RoIs whose largest foreground fc-score is not above this before the
    conv-head sees them.  Faster, but approximate: the conv-head's classifier alone might have kept them.  0: off."""


@dataclass(frozen=True)
class ImageConfig:
    """Resizing and normalisation, done inside the model."""

    min_size: Annotated[tuple[Count, ...], NotEmpty()] = (800,)
    """Short side in pixels; several: one is drawn per image in training, the last is used at test."""
    max_size: Count = 1333
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[NonZero, NonZero, NonZero] = (0.229, 0.224, 0.225)
    size_divisible: Count = 32
    channel_order: Literal["rgb", "bgr"] = "rgb"
    """The order in which the network wants the channels, and in which `mean` and `std` are given; images are RGB."""
    resize: Literal["torchvision", "detectron2", "mmdet", "maskrcnn_benchmark"] = "torchvision"
    """The project whose rounding of the new size and interpolation to use; see `doublehead.models.images`."""


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

    format: DataFormat = "shapes"
    """`auto`: find out the layout of `root`."""
    root: str | None = None
    """Folder of the data set; `shapes` is generated and needs none."""
    train_split: str = "train"
    """coco: `instances_<split>.json` and folder `<split>`; voc: `ImageSets/Main/<split>.txt`; auto: the split's name in
    whichever layout is found, `train` also finding its usual spellings; shapes: any."""
    val_split: str = "val"
    """auto: `val` also finds `valid` and `validation`, else `test`."""
    classes: tuple[str, ...] | None = None
    """Learn these classes alone, in this order; objects of other classes are left out.  None: all that are found."""
    val_share: Annotated[float, Bounds(above=0, below=1)] = 0.2
    """auto: the share of the images to validate on where the data have one split alone, drawn by `split_seed`."""
    split_seed: CountOrZero = 0
    """auto: the draw that divides a single split."""
    train_images: CountOrNone = None
    """Use only the first N images of the split (shapes: generate N)."""
    val_images: CountOrNone = None
    image_size: int = 128
    """Side of a generated image (shapes only)."""
    on_bad_record: Literal["error", "skip"] = "error"
    """What to do with a broken image or annotation: stop with its name, or leave it out and count it."""
    max_skipped: Fraction = 0.1
    """Largest share of the images, and of the objects, that on-bad-record `skip` may leave out (it always may leave out
    three; 0: none)."""
    background: Literal["drop", "keep"] = "drop"
    """Training images without any object: leave them out, as the paper does, or learn from them as well."""
    max_pixels: Annotated[int, Bounds(least=1, most=MOST_PIXELS)] = MAX_PIXELS
    """Refuse larger images, before they are decoded; at most 178,956,970, where Pillow refuses in any case."""
    outside_root: bool = False
    """Read images whose names in the annotations (absolute, or with `..`) lead out of the data set's folder;
    symbolic links are followed in any case."""
    workers: CountOrZero = 2
    """Loader processes per rank."""


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of training images besides the flip, by torchvision.transforms.v2; all off in the paper."""

    scale: tuple[Positive, Positive] = (1.0, 1.0)
    """Resize by a factor drawn between these; (1, 1): off."""
    crop: Fraction = 0.0
    """Probability of a random crop that keeps at least one object."""
    colour: Annotated[float, Bounds(least=0, most=1)] = 0.0
    """Largest relative change of brightness, contrast and saturation; 0: off."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation."""

    steps: Count = 180_000
    """On the command line, without milestones: the schedule (milestones, warm-up) is scaled to this length."""
    batch_size: Annotated[int, Bounds(least=1, most=MOST_IMAGES)] = 8
    """Images per optimizer step, over all ranks and accumulation steps."""
    accumulate: Count = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd` is the paper's; `adamw` gets further in a few hundred steps from scratch."""
    lr: NonNegative = 0.01
    momentum: BelowOne = 0.9
    """Momentum of `sgd`; first beta of `adamw`."""
    weight_decay: NonNegative = 1e-4
    bias_lr_factor: NonNegative = 2.0
    """Biases: this times the learning rate, no weight decay."""
    epochs: Annotated[float | None, Bounds(above=0)] = None
    """Passes over the training images, instead of `steps`; the schedule is scaled to their length."""
    schedule: Literal["step", "cosine"] = "step"
    """How the rate falls after the warm-up: times `gamma` at each milestone, or along half a cosine to 0."""
    milestones: tuple[CountOrZero, ...] = (120_000, 160_000)
    gamma: NonNegative = 0.1
    warmup_steps: CountOrZero = 500
    warmup_factor: NonNegative = 1 / 3
    clip_grad_norm: Annotated[float | None, Bounds(above=0)] = None
    amp: Literal["off", "bf16", "fp16"] = "off"
    ema_decay: Annotated[float | None, Bounds(least=0, below=1)] = None
    """Keep an exponential moving average of the weights and evaluate it."""
    sync_batch_norm: bool = False
    channels_last: bool = True
    horizontal_flip: Fraction = 0.5
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    aspect_ratio_grouping: bool = True
    eval_every: CountOrZero = 0
    """Evaluate each N steps, and keep the best weights by AP in best.safetensors; 0: only at the end."""
    checkpoint_every: CountOrZero = 1000
    log_every: Count = 20
    seed: CountOrZero = 0
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
