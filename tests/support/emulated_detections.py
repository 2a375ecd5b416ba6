"""The CUDA kernels of the detections on the emulator, called as csrc/detections/cuda/detections.cu launches them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from doublehead.ops.detections.arguments import DetectionArguments
from doublehead.ops.detections.by_class import DTYPES, NUMBERS, SIZE_DTYPES
from tests.cuda_emulation.build import IN_ORDER, Order, open_emulated

SIZES = {torch.float32: 0, torch.float64: 1, torch.int32: 2, torch.int64: 3}
assert set(SIZES) == set(SIZE_DTYPES)


class Call(ctypes.Structure):
    """As in tests/cuda_emulation/detections.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("fc", "conv", "valid", "deltas", "proposals", "sizes")),
        *((name, ctypes.c_int64) for name in ("logit_dtype", "delta_dtype", "proposal_dtype", "size_type")),
        *((name, ctypes.c_int64) for name in ("fusion", "images", "rois", "classes", "most")),
        ("fc_strides", ctypes.c_int64 * 3),
        ("conv_strides", ctypes.c_int64 * 3),
        ("valid_strides", ctypes.c_int64 * 2),
        ("delta_strides", ctypes.c_int64 * 4),
        ("proposal_strides", ctypes.c_int64 * 3),
        ("size_strides", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64) for name in ("deltas_together", "proposals_together")),
        *((name, ctypes.c_double) for name in ("score_threshold", "nms_iou", "min_size", "least_side")),
        ("weights", ctypes.c_double * 4),
    ]

    def data_ptr(self) -> int:  # as a tensor, to be passed by `Emulated.call`
        return ctypes.addressof(self)


def make_call(args: DetectionArguments) -> Call:
    fc, conv = args.logits[0], args.logits[-1]
    alone = len(args.logits) == 1 or args.fusion == "none"
    call = Call(
        *(item.data_ptr() for item in (fc, conv, args.valid, args.deltas, args.proposals, args.sizes)),
        *(DTYPES.index(item.dtype) for item in (fc, args.deltas, args.proposals)), SIZES[args.sizes.dtype],
        NUMBERS[args.fusion], *fc.shape, args.max_detections,
        fc.stride(), conv.stride(), args.valid.stride(), args.deltas.stride(), args.proposals.stride(),
        args.sizes.stride(), together(args.deltas), together(args.proposals),
        args.score_threshold, args.nms_iou, args.min_size, args.least_side, tuple(args.box_weights),
    )  # fmt: skip
    if alone:
        call.conv = None
    return call


def together(tensor: Tensor) -> bool:
    """Whether each four numbers can be loaded at once."""
    *outer, last = tensor.stride()
    aligned = tensor.data_ptr() % (4 * tensor.element_size()) == 0
    return last == 1 and aligned and all(stride % 4 == 0 for stride in outer)


def emulated(args: DetectionArguments, order: Order = IN_ORDER) -> tuple[Tensor, ...]:
    """boxes, scores, labels, count, in memory that was poisoned before."""
    batch, most = len(args.valid), args.max_detections
    boxes, scores = torch.full((batch, most, 4), float("nan")), torch.full((batch, most), float("nan"))
    labels, count, launches = torch.full((batch, most), -7), torch.full((batch,), -7), torch.full((1,), -7)
    results = boxes, scores, labels, count
    open_emulated("detections.cpp").call("detections", make_call(args), *results, launches, order=order)
    assert launches.item() == 3
    return results


def emulated_scores(args: DetectionArguments) -> Tensor:
    """The scores that the kernels compute on, `[B, R, C - 1]`; NaN where there is no candidate."""
    batch, rois, classes = args.logits[0].shape
    keys = torch.full((batch, classes - 1, -(-rois // 8) * 8), -7, dtype=torch.int32)
    open_emulated("detections.cpp").call("detection_scores", make_call(args), keys)
    assert (keys[..., rois:] == -1).all()  # what fills up the last RoIs is no candidate
    keys = keys[..., :rois].long() & 0xFFFFFFFF
    bits = torch.where(keys >> 31 == 1, keys, ~keys & 0x7FFFFFFF).to(torch.int64)
    scores = (bits - (bits >> 31 << 32)).int().view(torch.float32)  # of no score: a NaN
    return scores.transpose(1, 2)


def emulated_boxes(args: DetectionArguments) -> tuple[Tensor, Tensor]:
    """The boxes that the kernels compute on, `[B, R, C, 4]`, and whether each can be a detection."""
    batch, rois, classes = args.logits[0].shape
    boxes = torch.full((batch, rois, classes, 4), float("nan"))
    usable = torch.full((batch, rois, classes), 7, dtype=torch.uint8)
    open_emulated("detections.cpp").call("detection_boxes", make_call(args), boxes, usable)
    return boxes, usable.bool()
