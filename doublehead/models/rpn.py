"""Region proposal network: which boxes may hold an object (Ren et al. 2015, on a pyramid)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, relu, smooth_l1_loss

from ..config import RPNConfig
from ..ops import nms_padded
from ..ops.boxes import clip_boxes, decode_boxes, encode_boxes
from . import folded
from .anchors import Anchors, inside_images
from .matching import IGNORE, match, sample
from .structures import ImageBatch, Proposals, Targets, at_least_float32, gather_rows

RELU = nn.ReLU().eval()
BOX_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


class RPN(nn.Module):
    """A 3x3 convolution and two 1x1 outputs on every level, then NMS within each level.

    Args:
        config: anchors, sampling, limits.
        channels: width of every map.
        strides: pixels per cell of each map: one map for each anchor size, or a single one, which then has all sizes.
        min_side: how wide and high, in pixels, a box outside of the image is after clipping.

    Raises:
        ValueError: another number of maps, or an unknown option; the message names it.
    """

    def __init__(
        self, config: RPNConfig, channels: int, strides: Sequence[int] = (4, 8, 16, 32, 64), min_side: float = 0.0
    ) -> None:
        super().__init__()
        self.config = config
        self.min_side = min_side
        self.anchors = Anchors(config, strides)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, self.anchors.per_cell, 1)
        self.deltas = nn.Conv2d(channels, 4 * self.anchors.per_cell, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; in models that version 0.1.0 pickled whole, `min_side` has its former name."""
        if "least_side" in state:
            state = dict(state)
            state["min_side"] = state.pop("least_side")
        super().__setstate__(state)

    def forward(
        self, images: ImageBatch, features: Sequence[Tensor], targets: Targets | None = None
    ) -> tuple[Proposals, dict[str, Tensor]]:
        """Propose boxes; in training also the losses.

        Args:
            images: the batch the features were computed from.
            features: one `Tensor[B, C, H, W]` per anchor size.
            targets: ground truth; None at inference.

        Returns:
            Proposals `[B, R, 4]` with R = min(post_nms, all candidates), best first, without gradient,
            and the losses ("loss_rpn_objectness", "loss_rpn_box"), empty without targets.
        """
        logits, deltas = zip(*self._predict_all(features), strict=True)
        anchors, levels = self._anchors_and_levels(features, logits, images.pixels.shape[-2:])
        proposals = self._propose(images, anchors, levels, [x.detach() for x in logits], [x.detach() for x in deltas])
        if targets is None:
            return proposals, {}
        return proposals, self._losses(
            torch.cat(anchors), images.sizes, torch.cat(logits, 1), torch.cat(deltas, 1), targets
        )

    def train(self, mode: bool = True) -> RPN:
        folded.forget(self)
        folded.forget(self.anchors)
        return super().train(mode)

    def _predict_all(self, features: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """`predict` of every map."""
        maps = None
        if getattr(self.predict, "__func__", None) is RPN.predict:  # nobody put another in its place
            maps = folded.rpn_head(self, [self.conv, RELU], self.objectness, self.deltas, features)
        if maps is None:
            return [self.predict(feature) for feature in features]
        return [self._by_anchor(*of_level) for of_level in zip(*maps, strict=True)]

    def predict(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """`Tensor[B, C, H, W]` -> logits `[B, H*W*A]` and deltas `[B, H*W*A, 4]`, at least fp32."""
        hidden = relu(self.conv(feature))
        return self._by_anchor(self.objectness(hidden), self.deltas(hidden))

    @staticmethod
    def _by_anchor(logits: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        """Maps `[B, A, H, W]` and `[B, 4 A, H, W]` -> `[B, H*W*A]` and `[B, H*W*A, 4]`, at least fp32."""
        # Converted first: channels that lie apart in a wider map then become rows in the same pass.
        logits = at_least_float32(logits.permute(0, 2, 3, 1)).flatten(1)
        deltas = at_least_float32(deltas.permute(0, 2, 3, 1)).reshape(logits.shape[0], -1, 4)
        return logits, deltas

    @property
    def _pre_nms(self) -> int:
        """How many anchors of each level become candidates, at most."""
        return self.config.pre_nms_train if self.training else self.config.pre_nms_test

    def _anchors_and_levels(
        self, features: Sequence[Tensor], logits: Sequence[Tensor], image_size: Sequence[int]
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Anchors of each map, and of each candidate its level (int64 `Tensor[N]`); at inference made once a shape."""

        def make() -> tuple[Sequence[Tensor], Tensor]:
            counts = [min(self._pre_nms, of_level.shape[1]) for of_level in logits]
            levels = [torch.full((n,), level, device=logits[0].device) for level, n in enumerate(counts)]
            return self.anchors(features, image_size), torch.cat(levels)

        if type(self.anchors) is not Anchors:  # others may depend on more than sizes, and have no `cells`
            return make()
        sizes = tuple(feature.shape[-2:] for feature in features), tuple(image_size)
        kind = (*sizes, self.anchors.strides, self._pre_nms)
        return folded.constant(self.anchors, [self.anchors.cells], kind, make)

    def _propose(
        self,
        images: ImageBatch,
        anchors: Sequence[Tensor],
        levels: Tensor,
        logits: list[Tensor],
        deltas: list[Tensor],
    ) -> Proposals:
        scores, moves, starts = [], [], []
        for anchor, logit, delta in zip(anchors, logits, deltas, strict=True):
            best, index = logit.topk(min(self._pre_nms, logit.shape[1]), dim=1)
            scores.append(best)
            moves.append(gather_rows(delta, index))
            starts.append(anchor[index])
        boxes = decode_boxes(torch.cat(moves, 1), torch.cat(starts, 1), BOX_WEIGHTS)
        candidates = clip_boxes(boxes, images.sizes, self.min_side)
        sides = candidates[..., 2:] - candidates[..., :2]
        groups = torch.where((sides >= self.config.min_size).all(-1), levels, -1)

        post_nms = self.config.post_nms_train if self.training else self.config.post_nms_test
        slots = min(post_nms, groups.shape[1])
        merged, largest = torch.cat(scores, 1).sigmoid(), self._pre_nms  # candidates of a level, at most
        kept, count = nms_padded(candidates, merged, groups, self.config.nms_iou, slots, largest)
        valid = torch.arange(slots, device=kept.device) < count[:, None]
        kept_boxes = gather_rows(candidates, kept.clamp(min=0))
        return Proposals(torch.where(valid[..., None], kept_boxes, 0.0), valid)

    def assign(self, anchors: Tensor, sizes: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """As `match`; anchors that cross the border are matched like all others, and then ignored."""
        config = self.config
        matched, state = match(anchors, targets, config.positive_iou, config.negative_iou, keep_best=True)
        if config.straddle >= 0:
            inside = inside_images(anchors, sizes, config.straddle, last_pixel=config.anchors == "legacy")
            state = torch.where(inside, state, IGNORE)
        return matched, state

    def _losses(
        self, anchors: Tensor, sizes: Tensor, logits: Tensor, deltas: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        config = self.config
        with torch.no_grad():
            matched, state = self.assign(anchors, sizes, targets)
            indices, drawn = sample(state, config.samples, config.positive_fraction)
            labels = state.gather(1, indices)
            sampled_anchors = anchors[indices]
            matched_boxes = gather_rows(targets.boxes, matched.gather(1, indices))
            wanted = encode_boxes(matched_boxes, sampled_anchors, BOX_WEIGHTS)
        total = drawn.sum().clamp(min=1)
        objectness = binary_cross_entropy_with_logits(
            logits.gather(1, indices), labels.to(logits.dtype), weight=drawn.to(logits.dtype), reduction="sum"
        )
        box = smooth_l1_loss(gather_rows(deltas, indices), wanted, beta=config.smooth_l1_beta, reduction="none")
        box = torch.where((drawn & (labels == 1))[..., None], box, 0.0).sum()
        return {"loss_rpn_objectness": objectness / total, "loss_rpn_box": box / total}
