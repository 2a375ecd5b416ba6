"""A recipe for every row of the paper's Tables 1 to 6 (`doublehead.paper` says which is which).

All follow PAPER section 5.1: COCO 2017 (train 118k, val 5k), 8 images a step, 180k steps.  Where text and the authors'
release differ, heads and training follow the release, which gave the published numbers: the conv-head pools boxes
enlarged 1.3 times, the non-local block is the release's, and the RPN ignores anchors that cross the image's border.
Images, backbone and boxes follow torchvision, whose ImageNet weights are available.

`double-head-ext-r50-fpn-text` follows the text in its heads instead, and `double-head-ext-r50-fpn-release` the release
in everything.  docs/other-projects.md has all conventions of all recipes in one table.
"""

from __future__ import annotations

from dataclasses import replace

from doublehead.config import (
    BackboneConfig,
    DataConfig,
    DetectionConfig,
    HeadConfig,
    HeadKind,
    ImageConfig,
    LossConfig,
    ModelConfig,
    NonLocalConfig,
    Recipe,
    RoIConfig,
    RPNConfig,
    TrainConfig,
)
from doublehead.paper import rows_of

COCO = DataConfig("coco", "data/coco", "train2017", "val2017", workers=4)
VOC07 = DataConfig("voc", "data/VOCdevkit/VOC2007", "trainval", "test", workers=4)
VOC_TRAINING = TrainConfig(steps=9000, milestones=(6000, 8000))
"""Our schedule, as the paper gives none for VOC07: 14 passes over its 5011 images, milestones at 2/3 and 8/9."""

UNWEIGHTED = LossConfig(w_fc=1.0, w_conv=1.0)
PLAIN = NonLocalConfig(enabled=False)
RPN = RPNConfig(straddle=0.0)
MSRA_R50 = "R-50.pkl"
"""The ResNet-50 the release starts from: MSRA's weights with Caffe2's names.  The file is expected in the current
folder and never downloaded; `doublehead.models.backbone.MSRA_SOURCE` says where it is."""
MSRA_MEAN = (102.9801, 115.9465, 122.7717)
"""The mean of blue, green and red, in 0 .. 255."""

HEADS = "follows the {} in heads and training, torchvision in images, backbone and boxes"


def paper_recipes() -> list[Recipe]:
    """Every recipe of Tables 1 to 6, and Ext following the text, and following the release in everything."""
    return [*_single_heads(), *_double_heads(), *_depths(), *_ext(), *_c4(), *_voc(), _release()]


def _single_heads() -> list[Recipe]:
    return [
        _fpn("faster-rcnn-r50-fpn", HeadConfig("fc"), UNWEIGHTED),
        _fpn("faster-rcnn-r101-fpn", HeadConfig("fc"), UNWEIGHTED, "resnet101"),
        _fpn("conv-head-r50-fpn", HeadConfig("conv", non_local=PLAIN), UNWEIGHTED),
    ]


def _double_heads() -> list[Recipe]:
    """Table 1, without non-local blocks, with loss weights 1 and the paper's 2.0 and 2.5; and Table 4."""
    kinds: dict[str, HeadKind] = {
        "double-fc": "double_fc",
        "double-conv": "double_conv",
        "double-head-reverse": "double_head_reverse",
        "double-head-k5": "double_head",
    }
    recipes = []
    for name, kind in kinds.items():
        head = HeadConfig(kind, non_local=PLAIN)
        recipes.append(_fpn(f"{name}-unweighted-r50-fpn", head, UNWEIGHTED))
        recipes.append(_fpn(f"{name}-r50-fpn", head))
    return [
        *recipes,
        _fpn("double-head-r50-fpn", HeadConfig("double_head")),
        _fpn("double-head-r101-fpn", HeadConfig("double_head"), backbone="resnet101"),
    ]


def _depths() -> list[Recipe]:
    """Table 2 except for K = 0 (`faster-rcnn-r50-fpn`), K = 5 (Table 1) and 5 with non-local blocks (Table 4)."""
    plain = [
        _fpn(f"double-head-k{blocks}-r50-fpn", HeadConfig("double_head", conv_blocks=blocks, non_local=PLAIN))
        for blocks in (1, 2, 3, 4, 6, 7)
    ]
    non_local = [
        _fpn(f"double-head-nl{blocks}-r50-fpn", HeadConfig("double_head", conv_blocks=blocks)) for blocks in (3, 7)
    ]
    return plain + non_local


def _ext() -> list[Recipe]:
    """Ext; the fusions of Table 3 are four read-outs of one training."""
    head = HeadConfig("double_head_ext")
    recipes = [
        _fpn("double-head-ext-r50-fpn", head),
        _fpn("double-head-ext-r101-fpn", head, backbone="resnet101"),
    ]
    for fusion in ("none", "max", "average"):
        recipe = _fpn(f"double-head-ext-{fusion}-r50-fpn", head)
        recipes.append(_with_model(recipe, detection=DetectionConfig(fusion=fusion)))
    text = replace(
        head,
        non_local=NonLocalConfig(pairwise="embedded_gaussian", groups=1, relu_after=False),
    )
    about = (
        "Ext as the text has it: no enlarged boxes; non-local blocks with softmax, one group, no ReLU after them; "
        "anchors across the border are learnt from"  # as in its reference for pyramids, Lin et al. 2017
    )
    as_text = _fpn("double-head-ext-r50-fpn-text", text, about=about, follows=HEADS.format("text"))
    return [*recipes, _with_model(as_text, roi=RoIConfig(conv_box_scale=1.0), rpn=RPNConfig())]


def _release() -> Recipe:
    """Ext with the conventions that `convert` gives a checkpoint of the release.

    There is one exception: in training, the release keeps 2000 proposals per GPU, from a batch of two images.  That
    rule depends on the batch size and costs AP with larger batches; here 1000 are kept for each image.
    """
    model = ModelConfig(
        backbone=BackboneConfig("resnet50", norm_eps=0.0, weights=MSRA_R50, stride_in_1x1=True),
        rpn=replace(RPN, anchors="legacy", min_size=0.0),
        roi=RoIConfig(level_rule="maskrcnn_benchmark", conv_box_scale=1.3),
        head=HeadConfig("double_head_ext"),
        detection=DetectionConfig(min_size=0.0),
        image=ImageConfig(
            mean=tuple(level / 255 for level in MSRA_MEAN), std=(1 / 255,) * 3, channel_order="bgr",
            resize="maskrcnn_benchmark",
        ),
        legacy_boxes=True,
    )  # fmt: skip
    about = f"Ext from MSRA's ResNet-50 in {MSRA_R50}"
    follows = "follows the release throughout, but keeps 1000 proposals of each image, not 2000 of two"
    return _recipe("double-head-ext-r50-fpn-release", model, about, follows)


def _c4() -> list[Recipe]:
    """Faster R-CNN without a pyramid (Table 4), with the settings of the release's C4 configuration."""
    recipes = []
    for depth in (50, 101):
        model = ModelConfig(
            backbone=BackboneConfig(neck="none", name=f"resnet{depth}"),
            rpn=replace(RPN, pre_nms_train=12_000, pre_nms_test=6000, post_nms_train=2000),
            roi=RoIConfig(output_size=14, sampling_ratio=0),
            head=HeadConfig("conv5"),
            loss=UNWEIGHTED,
        )
        recipes.append(_recipe(f"faster-rcnn-r{depth}-c4", model))
    return recipes


def _voc() -> list[Recipe]:
    models = {"faster-rcnn": (HeadConfig("fc"), UNWEIGHTED), "double-head-ext": (HeadConfig("double_head_ext"), None)}
    return [
        replace(_fpn(f"{name}-r50-fpn-voc07", head, loss), data=VOC07, train=VOC_TRAINING)
        for name, (head, loss) in models.items()
    ]


def _fpn(
    name: str,
    head: HeadConfig,
    loss: LossConfig | None = None,
    backbone: str = "resnet50",
    about: str = "",
    follows: str = HEADS.format("release"),
) -> Recipe:
    model = ModelConfig(backbone=BackboneConfig(name=backbone), rpn=RPN, head=head, loss=loss or LossConfig())
    return _recipe(name, model, about, follows)


def _recipe(name: str, model: ModelConfig, about: str = "", follows: str = HEADS.format("release")) -> Recipe:
    rows = "; ".join(f"Table {number}: {row.label}" for number, row in rows_of(name))
    return Recipe(name, f"{about or rows}; {follows}", model, COCO, TrainConfig())


def _with_model(recipe: Recipe, **changes: object) -> Recipe:
    return replace(recipe, model=replace(recipe.model, **changes))
