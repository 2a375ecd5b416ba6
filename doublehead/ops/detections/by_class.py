"""Detections on CUDA, class by class (csrc/detections): which calls its kernels take.

A block sorts the candidates of a class in its shared memory, so their number is bounded.  Other calls go to the Triton
kernels and `nms_padded`, or to the reference.
"""

from __future__ import annotations

import torch

from .arguments import DetectionArguments

#: As in csrc/detections/cuda.
MOST_ROIS, MOST_CLASSES, MOST_DETECTIONS = 1024, 1216, 1024

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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
