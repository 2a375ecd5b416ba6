"""torchvision's networks run folded at inference on a CPU and on CUDA (`doublehead.models.folded`).

As in `modules`, each class adds behaviour but no state.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead

from ...models import folded


class _Folded(nn.Module):
    """What is folded is forgotten by `train()` and `eval()`."""

    def train(self, mode: bool = True) -> _Folded:
        for module in self.modules():
            folded.forget(module)
        return super().train(mode)


class FoldedBackboneWithFPN(_Folded, BackboneWithFPN):
    """A ResNet with a feature pyramid; the maps are channels-last."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = folded.backbone(self, self.body, self.fpn, x)
        return super().forward(x) if maps is None else OrderedDict(maps)


class FoldedRPNHead(_Folded, RPNHead):
    """Hidden convolutions and both outputs of every level."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        outputs = folded.rpn_head(self, [self.conv], self.cls_logits, self.bbox_pred, x)
        return super().forward(x) if outputs is None else outputs


class FoldedTwoMLPHead(_Folded, TwoMLPHead):
    """The box head's two fully connected layers; the pooled maps are read as they lie."""

    def forward(self, x: Tensor) -> Tensor:
        vectors = folded.one_after_other(self, [self.fc6, self.fc7], x) if _as_defined(TwoMLPHead) else None
        return super().forward(x) if vectors is None else vectors


class FoldedFastRCNNConvFCHead(_Folded, FastRCNNConvFCHead):
    """Convolutions with their norms, then fully connected layers; where a part does not fold, its modules run."""

    def forward(self, x: Tensor) -> Tensor:
        modules = list(self)
        middle = [index for index, module in enumerate(modules) if type(module) is nn.Flatten]
        if torch.compiler.is_compiling() or not _as_defined(FastRCNNConvFCHead) or len(middle) != 1:
            return super().forward(x)
        convs, rest = modules[: middle[0]], modules[middle[0] :]
        maps = folded.sequence(self, convs, x) if convs else None
        for module in convs if maps is None else []:
            x = module(x)
        x = x if maps is None else maps
        layers = folded.with_relu(rest)
        vectors = folded.one_after_other(layers[0], layers, x) if layers else None
        for module in rest if vectors is None else []:
            x = module(x)
        return x if vectors is None else vectors


class FoldedFastRCNNPredictor(_Folded, FastRCNNPredictor):
    """Scores and deltas, in one product."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        layers = [self.cls_score, self.bbox_pred]
        outputs = folded.side_by_side(self, layers, x) if _as_defined(FastRCNNPredictor) else None
        return super().forward(x) if outputs is None else tuple(outputs)


_FORWARDS = {kind: kind.forward for kind in (TwoMLPHead, FastRCNNConvFCHead, FastRCNNPredictor)}


def _as_defined(kind: type) -> bool:
    """Whether nobody has put another `forward` into the class for all its modules."""
    return kind.forward is _FORWARDS[kind]


FOLDED = {
    BackboneWithFPN: FoldedBackboneWithFPN,
    RPNHead: FoldedRPNHead,
    TwoMLPHead: FoldedTwoMLPHead,
    FastRCNNConvFCHead: FoldedFastRCNNConvFCHead,
    FastRCNNPredictor: FoldedFastRCNNPredictor,
}
