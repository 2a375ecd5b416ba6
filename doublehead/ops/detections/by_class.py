"""Detections on CUDA, class by class (csrc/detections): which calls its kernels take.

A block sorts the candidates of a class in its shared memory, so their number is bounded.  Other calls go to the Triton
kernels and `nms_padded`, or to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..score_fusion.reference import FUSIONS
from .arguments import DetectionArguments

#: As in csrc/detections/cuda.
MOST_ROIS, MOST_CLASSES, MOST_DETECTIONS = 1024, 1216, 1024

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NUMBERS = {name: number for number, name in enumerate(FUSIONS)}
"""A fusion as the operator `detections_by_class` gets it: torch 2.11 leaks the text that it hands to C++."""

SIZE_DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64)


def serves(args: DetectionArguments) -> bool:
    """Whether the kernels take this call: neither float64 nor classifiers of two dtypes, not empty, not too large."""
    logits, deltas = args.logits, args.deltas
    batch, rois, classes = logits[0].shape
    return (
        batch > 0
        and 1 <= rois <= MOST_ROIS
        and 2 <= classes <= MOST_CLASSES
        and 1 <= args.max_detections <= MOST_DETECTIONS
        and logits[0].dtype in DTYPES
        and logits[-1].dtype == logits[0].dtype
        and deltas.dtype in DTYPES
        and args.proposals.dtype in (torch.float32, deltas.dtype)
        and args.sizes.dtype in SIZE_DTYPES
    )


def detections(args: DetectionArguments) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The result of the kernels, or None for a call that they do not serve."""
    if not serves(args):
        return None
    return torch.ops.doublehead.detections_by_class.default(*with_number(args))


def with_number(args: DetectionArguments) -> DetectionArguments:
    """The arguments of `detections_by_class`: the fusion is a number."""
    return args._replace(fusion=NUMBERS[args.fusion])


def with_name(args: DetectionArguments) -> DetectionArguments:
    """The inverse of `with_number`."""
    return args._replace(fusion=list(FUSIONS)[args.fusion])
