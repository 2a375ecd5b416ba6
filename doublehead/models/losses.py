"""Training the heads: which RoIs, and Equations 1-3."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, smooth_l1_loss

from ..config import ModelConfig, RoIConfig
from ..ops.boxes import encode_boxes
from .heads import HeadOutput
from .matching import match, sample
from .readout import task_weights
from .structures import Proposals, RoISamples, Targets, gather_rows


def sample_rois(proposals: Proposals, targets: Targets, config: RoIConfig) -> RoISamples:
    """Choose the RoIs of a training step: a random share of positives, background for the rest.

    Ground-truth boxes join the proposals.  Where an image has too few RoIs, the empty slots repeat
    its sampled ones and are marked invalid: they carry no loss, and the heads' batch norm
    sees no made-up input.

    Returns:
        `RoISamples[B, R]`, R = min(config.samples, proposals and ground truth together).
    """
    boxes = torch.cat([proposals.boxes, targets.boxes], dim=1)
    valid = torch.cat([proposals.valid, targets.valid], dim=1)
    matched, state = match(boxes, targets, config.positive_iou, config.positive_iou, keep_best=False)
    indices, drawn = sample(torch.where(valid, state, -1), config.samples, config.positive_fraction)
    repeat = torch.arange(indices.shape[1], device=indices.device) % drawn.sum(1, keepdim=True).clamp(min=1)
    indices = indices.gather(1, repeat)
    matched = matched.gather(1, indices)
    labels = targets.labels.gather(1, matched) * (state.gather(1, indices) == 1)
    return RoISamples(gather_rows(boxes, indices), drawn, labels, gather_rows(targets.boxes, matched))


def head_losses(outputs: dict[str, HeadOutput], rois: RoISamples, config: ModelConfig) -> dict[str, Tensor]:
    """Weighted losses of all heads.

    Cross entropy is the mean over all sampled RoIs; smooth L1 is summed over the positive RoIs
    and divided by the number of all sampled RoIs.

    Args:
        outputs: branch name -> output for the B * R RoIs.
        rois: `[B, R]`, what each RoI should become.
        config: for the loss weights and the box coder's.

    Returns:
        "loss_<branch>_cls" and "loss_<branch>_reg" -> scalar.
    """
    labels, valid = rois.labels.flatten(), rois.valid.flatten()
    wanted = encode_boxes(rois.matched_boxes, rois.boxes, config.roi.box_weights).flatten(0, 1)
    weights, beta = task_weights(config.head.kind, config.loss), config.loss.smooth_l1_beta
    losses = {}
    for name, output in outputs.items():
        if output.logits is not None:
            losses[f"loss_{name}_cls"] = weights[name][0] * classification_loss(output.logits, labels, valid)
        if output.deltas is not None:
            losses[f"loss_{name}_reg"] = weights[name][1] * box_loss(output.deltas, wanted, labels, valid, beta)
    return losses


def classification_loss(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """Mean cross entropy over the valid rows: `logits[N, C]`, `labels[N]`, `valid[N]` -> scalar."""
    loss = cross_entropy(logits, labels, reduction="none")
    return torch.where(valid, loss, 0.0).sum() / valid.sum().clamp(min=1)


def box_loss(deltas: Tensor, wanted: Tensor, labels: Tensor, valid: Tensor, beta: float) -> Tensor:
    """Smooth L1 of each positive RoI's own class, over all valid RoIs.

    Args:
        deltas: `Tensor[N, C, 4]`.
        wanted: `Tensor[N, 4]`, the encoded ground-truth boxes.
        labels: `Tensor[N]`; 0 is background.
        valid: `Tensor[N]`.
        beta: where the parabola ends.
    """
    own = deltas.gather(1, labels[:, None, None].expand(-1, 1, 4)).squeeze(1)
    loss = smooth_l1_loss(own, wanted, beta=beta, reduction="none")
    return torch.where((valid & (labels > 0))[:, None], loss, 0.0).sum() / valid.sum().clamp(min=1)
