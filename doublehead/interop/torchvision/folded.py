"""torchvision's networks run folded at inference on a CPU (`doublehead.models.folded`), and as they are elsewhere.

As in `modules`, each class adds behaviour but no state.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.rpn import RPNHead

from ...models import folded


class FoldedBackboneWithFPN(BackboneWithFPN):
    """A ResNet with a feature pyramid; the maps are channels-last."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = folded.backbone(self, self.body, self.fpn, x)
        return super().forward(x) if maps is None else OrderedDict(maps)

    def train(self, mode: bool = True) -> FoldedBackboneWithFPN:
        folded.forget(self)
        return super().train(mode)


class FoldedRPNHead(RPNHead):
    """Hidden convolutions and both outputs of every level."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        outputs = folded.rpn_head(self, [self.conv], self.cls_logits, self.bbox_pred, x)
        return super().forward(x) if outputs is None else outputs

    def train(self, mode: bool = True) -> FoldedRPNHead:
        folded.forget(self)
        return super().train(mode)


FOLDED = {BackboneWithFPN: FoldedBackboneWithFPN, RPNHead: FoldedRPNHead}
