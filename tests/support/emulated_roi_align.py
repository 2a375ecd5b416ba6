"""The CUDA kernels of RoIAlign, run on the CPU by the emulator."""

from __future__ import annotations

import torch
from torch import Tensor

from doublehead.ops.roi_align import reference
from doublehead.ops.roi_align.pooling import Pooling
from tests.cuda_emulation.build import IN_ORDER, open_emulated

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def call(name, maps, pooled, rois, pooling, channels_last, order=IN_ORDER, vectors=None, **options):
    """Runs the kernels: `maps` -> `pooled` (forward) or `pooled` -> `maps` (backward)."""
    pooling = Pooling(*pooling)
    first = maps[0]
    width = 16 // first.element_size()
    if vectors is None:  # as csrc/roi_align/cuda/roi_align.cu decides it
        strides = [m.stride(d) for m in maps for d in (0, 2, 3)] + [first.shape[1]]
        vectors = all(s % width == 0 for s in strides)
        vectors &= all(t.data_ptr() % (width * t.element_size()) == 0 for t in (*maps, *pooled))
    numbers = [DTYPES.index(first.dtype), channels_last, vectors, *first.shape[:2], len(maps), len(pooled),
               rois.shape[0], *pooling.output_size, pooling.sampling_ratio, pooling.aligned,
               pooling.canonical_level, pooling.epsilon_added_to]  # fmt: skip
    reals = [pooling.canonical_size, pooling.level_epsilon, pooling.end_offset]
    table = [[m.data_ptr(), *m.stride(), m.shape[2], m.shape[3]] for m in maps]
    open_emulated("roi_align.cpp").call(
        name, torch.tensor([int(n) for n in numbers]), torch.tensor(table),
        torch.tensor([p.data_ptr() for p in pooled]), rois.contiguous(),
        torch.tensor([*reals, *pooling.spatial_scales, *pooling.box_scales], dtype=torch.float64),
        *options.values(), order=order,
    )  # fmt: skip


def poison(*shape, like: Tensor, layout) -> Tensor:
    return torch.full(shape, torch.nan, dtype=like.dtype).contiguous(memory_format=layout)


def forward(features, rois, *pooling, order=IN_ORDER, no_room=False) -> list[Tensor]:
    last = reference.is_channels_last(features[0])
    layout = LAYOUTS[last]
    shape = rois.shape[0], features[0].shape[1], *pooling[2]
    outputs = [poison(*shape, like=features[0], layout=layout) for _ in pooling[1]]
    call("run_forward", features, outputs, rois, pooling, last, order, no_room=no_room)
    return outputs


def backward(grads, rois, feature_sizes, channels_last, *pooling, order=IN_ORDER, no_room=False) -> list[Tensor]:
    layout = LAYOUTS[channels_last]
    images, channels, *sides = feature_sizes
    results = [
        poison(images, channels, h, w, like=grads[0], layout=layout)
        for h, w in zip(sides[::2], sides[1::2], strict=True)
    ]
    grads = [grad.contiguous(memory_format=layout) for grad in grads]
    call("run_backward", results, grads, rois, pooling, channels_last, order, no_room=no_room)
    return results
