"""What `smoke.py` runs: each kernel once, forward and backward, against its reference in float64.

A case yields (what, error, bound).  Its numbers are drawn on the CPU, so that they are the same on every device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what the tests share (tests/support) serves here too

from doublehead import ops  # noqa: E402
from doublehead.ops.batch_norm import batch_norm_act_apply  # noqa: E402
from doublehead.ops.batch_norm import reference as batch_norm_reference  # noqa: E402
from doublehead.ops.batch_norm.arguments import ForwardArguments  # noqa: E402
from doublehead.ops.conv_head import Block  # noqa: E402
from doublehead.ops.conv_head import reference as conv_head_reference  # noqa: E402
from doublehead.ops.conv_head.arguments import pack  # noqa: E402
from doublehead.ops.detections import by_class  # noqa: E402
from doublehead.ops.detections import reference as detections_reference  # noqa: E402
from doublehead.ops.detections.arguments import DetectionArguments  # noqa: E402
from doublehead.ops.image_batch import reference as image_batch_reference  # noqa: E402
from doublehead.ops.image_batch.arguments import ImageBatchArguments  # noqa: E402
from doublehead.ops.nms import reference as nms_reference  # noqa: E402
from doublehead.ops.non_local import Attention  # noqa: E402
from doublehead.ops.non_local import reference as non_local_reference  # noqa: E402
from doublehead.ops.roi_align import reference as roi_align_reference  # noqa: E402
from doublehead.ops.roi_align.level_rules import LEVEL_RULES  # noqa: E402
from doublehead.ops.roi_align.pooling import Pooling  # noqa: E402
from doublehead.ops.score_fusion import reference as score_fusion_reference  # noqa: E402
from tests.support import detection_cases  # noqa: E402
from tests.support.nms_cases import clustered_boxes  # noqa: E402
from tests.support.non_local_cases import qkv_and_grad  # noqa: E402
from tests.support.precision import convolution_eps, error_and_bound  # noqa: E402

OPS = torch.ops.doublehead
Comparison = tuple[str, float, float]
"""What was compared, its error, and the bound of the error."""
FLOAT64, FLOAT32, HALF = (torch.float64,), (torch.float32,), (torch.float16, torch.bfloat16)


class Case(NamedTuple):
    """A kernel and what runs it."""

    run: Callable[[str, torch.dtype], Iterator[Comparison]]
    dtypes: Sequence[torch.dtype]
    operators: Sequence[str]
    """Operators of `torch.ops.doublehead` that it must call, and have kernels; Triton's may be launched directly."""
    launches: Sequence[str] = ()
    """Folders of `doublehead.ops` whose Triton kernels it must launch."""
    apart: bool = False
    """Each dtype in a process of its own: its kernels take long to compile."""
    cuda: bool = False
    """Whether it runs on a GPU alone."""


CASES: dict[str, Case] = {}


def case(name: str, dtypes: Sequence[torch.dtype], operators: str = "", launches: str = "", **more):
    """Registers the decorated function in `CASES`."""

    def enter(run):
        CASES[name] = Case(run, dtypes, operators.split(), launches.split(), **more)
        return run

    return enter


def normal(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * spread


def moved(value, device=None, dtype=None):
    """Tensors in nested lists and tuples on that device; floating ones in that dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device, dtype) for item in value)
    return value


def compare(actual, plain, exact, what: str = "forward", **more) -> Iterator[Comparison]:
    """The rule of accuracy for tensors, or for several that go together: the one nearest to its bound."""
    every = zip(*([v] if isinstance(v, Tensor) else v for v in (actual, plain, exact)), strict=True)
    found = [error_and_bound(*three, what, **more) for three in every]
    yield what, *max(found, key=lambda pair: pair[0] / pair[1] if pair[1] else pair[0])


def differing(actual: Tensor, expected: Tensor) -> int:
    """Number of unequal elements; all of them if the shapes differ."""
    if actual.shape != expected.shape:
        return max(actual.numel(), expected.numel(), 1)
    return int((actual.cpu() != expected.cpu()).sum())


def maps(device: str) -> tuple[int, int]:
    """Number of RoIs and of channels: small on the CPU, where Triton's interpreter may run."""
    return (16, 128) if device == "cuda" else (2, 16)


# ---------------------------------------------------------------------------------------------
# Boxes


@case("roi_align", FLOAT32 + HALF + FLOAT64, "pyramid_roi_align pyramid_roi_align_backward")
def roi_align(device, dtype):
    boxes, channels = (100, 64) if device == "cuda" else (6, 8)
    features = [normal(2, channels, 64 // s, 96 // s).to(dtype) for s in (1, 2)]
    corner = torch.rand(boxes, 2, generator=torch.Generator().manual_seed(1)) * 150
    side = 10 + torch.rand(boxes, 2, generator=torch.Generator().manual_seed(2)) * 80
    rois = torch.cat((torch.arange(boxes)[:, None] % 2, (4 * corner).round() / 4, (4 * (corner + side)).round() / 4), 1)
    grads = [normal(boxes, channels, 7, 7, seed=i).to(dtype) for i in range(2)]
    pooling = Pooling((0.25, 0.125), (1.0, 1.25), (7, 7), 2, False, 64.0, 3, *LEVEL_RULES["torchvision"])
    sizes = [2, channels, *(side for feature in features for side in feature.shape[2:])]
    options = dict(
        spatial_scales=pooling.spatial_scales, box_scales=pooling.box_scales, canonical_size=64.0, canonical_level=3
    )
    for name, memory_format in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last)):
        ours = [f.to(device).contiguous(memory_format=memory_format).requires_grad_() for f in features]
        forward = ops.multiscale_roi_align(ours, rois.to(device), 7, **options)
        backward = torch.autograd.grad(forward, ours, moved(grads, device))
        results = []
        for where, wide in ((device, dtype), ("cpu", torch.float64)):
            boxes_there = rois.to(where, torch.promote_types(wide, torch.float32))
            given = moved(features, where, wide), moved(grads, where, wide)
            results.append((
                roi_align_reference.multiscale_roi_align(given[0], boxes_there, pooling),
                roi_align_reference.multiscale_roi_align_backward(
                    given[1], boxes_there, sizes, memory_format == torch.channels_last, pooling),
            ))  # fmt: skip
        yield from compare([y.detach() for y in forward], results[0][0], results[1][0], f"{name} forward", roundings=8)
        yield from compare(backward, results[0][1], results[1][1], f"{name} backward", roundings=8)


def scored_boxes(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes in clusters, scores with ties, and classes."""
    boxes, scores = clustered_boxes(3000 if device == "cuda" else 60, seed=0)
    return boxes.to(dtype), scores.to(dtype), torch.arange(len(boxes)) % 5


@case("nms", FLOAT32 + HALF + FLOAT64, "nms")
def nms(device, dtype):
    boxes, scores, groups = scored_boxes(device, dtype)
    on_device = moved((boxes, scores, groups), device)
    expected = nms_reference.nms(boxes, scores, None, 0.5)
    yield "indices", differing(ops.nms(*on_device[:2], 0.5), expected), 0
    expected = nms_reference.nms(boxes, scores, groups, 0.5)
    yield "by class", differing(ops.batched_nms(*on_device, 0.5), expected), 0
    boxes, scores = clustered_boxes(20_000 if device == "cuda" else 200, seed=1, objects=300)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    for classes in (1, 3, 100):  # sorted, and decided on in rounds, by a block for each class, or both
        groups = torch.arange(len(boxes)) % 199 % classes
        actual = ops.batched_nms(*moved((boxes, scores, groups), device), 0.5)
        yield f"{len(boxes)} boxes of {classes}", differing(actual, ops.batched_nms(boxes, scores, groups, 0.5)), 0


@case("nms_padded", FLOAT32 + HALF + FLOAT64, "nms_padded")
def nms_padded(device, dtype):
    given = [torch.stack((value, value.flip(0))) for value in scored_boxes(device, dtype)]
    expected = nms_reference.nms_padded(*given, 0.5, 50)
    actual = ops.nms_padded(*moved(given, device), 0.5, 50)
    yield "indices", differing(actual[0], expected[0]) + differing(actual[1], expected[1]), 0


@case("detections", FLOAT32 + HALF, "detections detections_by_class")
def detections(device, dtype):
    rois, classes = (200, 5) if device == "cuda" else (20, 6)
    yield from compare_detections(ops.detections, device, dtype, rois, classes)
    yield from compare_detections(by_class_alone, device, dtype, rois, classes)


def by_class_alone(*given, **options):
    return OPS.detections_by_class(*by_class.with_number(DetectionArguments(*given, **options)))


@case("detections_triton", FLOAT32 + HALF, "detections", "detections")
def detections_triton(device, dtype):
    """The Triton kernels, which take what is too large for those in CUDA."""
    rois, classes = (1025, 2) if device == "cuda" else (20, 6)
    yield from compare_detections(ops.detections, device, dtype, rois, classes)


def compare_detections(function, device, dtype, rois, classes):
    options = detection_cases.OPTIONS
    for seed in range(100):  # the first whose scores are not so close that rounding may turn them round
        given = moved(detection_cases.tensors(rois=rois, classes=classes, seed=seed, scale=1.0), dtype=dtype)
        given = (*given[:2], given[2].float(), given[3], given[4].float())
        if detection_cases.clear(given, options):
            break
    expected, exact = (
        detections_reference.detections(DetectionArguments(*moved(given, dtype=wide), **options))
        for wide in (torch.float32, torch.float64)
    )
    actual = function(*moved(given, device), **options)
    yield "labels", differing(actual[2], expected[2]) + differing(actual[3], expected[3]), 0
    yield from compare(actual[:2], expected[:2], exact[:2], "boxes")


# ---------------------------------------------------------------------------------------------
# Features and scores


@case("non_local_attention", FLOAT32 + HALF, "non_local_attention non_local_attention_backward", "non_local",
      apart=True)  # fmt: skip
def non_local_attention(device, dtype):
    number, _ = maps(device)
    for cells, softmax in ((49, False), (49, True), (100, True)):  # the last: a RoI is more than one tile
        qkv, grad = qkv_and_grad(number, cells, 64, dtype)
        attention = 2, softmax, 32**-0.5 if softmax else 1 / cells
        ours = qkv.to(device).requires_grad_()
        forward = OPS.non_local_attention(ours, *attention)
        (backward,) = torch.autograd.grad(forward, ours, grad.to(device))
        for name, actual, function, given in (
            ("forward", forward.detach(), non_local_reference.non_local_attention, (qkv,)),
            ("backward", backward, non_local_reference.non_local_attention_backward, (grad, qkv)),
        ):
            plain, exact = (
                function(*moved(given, where, wide), Attention(*attention)) for where, wide in each(device, dtype)
            )  # fmt: skip
            yield from compare(actual, plain, exact, f"{name}, {cells} cells, softmax {softmax}")


def each(device: str, dtype: torch.dtype) -> tuple[tuple[str, torch.dtype], ...]:
    """Where plain PyTorch computes for comparison, and in what: as the kernel does, and exactly."""
    return (device, dtype), ("cpu", torch.float64)


def weights(*shape: int, seed: int) -> Tensor:
    """Weights of a convolution, scaled so that its results are about as large as its inputs."""
    weight = normal(*shape, seed=seed, spread=shape[1] ** -0.5 / (3 if len(shape) == 4 else 1))
    return weight.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else weight


@case("fused_conv", FLOAT32 + HALF, "fused_conv", "fused_conv", apart=True)
def fused_conv(device, dtype):
    number, channels = maps(device)
    x, second, residual = (normal(number * 49, channels, seed=i) for i in range(3))
    bias, count = normal(channels), torch.tensor(number - 1)
    every = {
        "1x1": (x, weights(channels, channels, seed=1), bias, None, residual, None, [7, 7], True, False),
        "3x3": (x, weights(channels, channels, 3, 3, seed=2), bias, None, None, count, [7, 7], True, False),
        "mean": (x, weights(channels, 2 * channels, seed=3), bias, second, None, count, [7, 7], True, True),
    }
    for name, given in every.items():
        given = moved(given, dtype=dtype)
        plain, exact = (plain_fused_conv(*moved(given, *there)) for there in each(device, dtype))
        with torch.no_grad():
            actual = OPS.fused_conv(*moved(given, device))
        yield from compare(actual, plain, exact, name, eps=convolution_eps(device, dtype))


def plain_fused_conv(x, weight, bias, second, residual, count, size, relu, mean) -> Tensor:
    """By PyTorch's convolution, in the precision that PyTorch gives it."""
    rows = x if second is None else torch.cat((x, second), 1)
    weight = weight if weight.dim() == 4 else weight[:, :, None, None]
    y = rows.view(-1, *size, rows.shape[1]).permute(0, 3, 1, 2)
    y = nn.functional.conv2d(y, weight, bias, padding=weight.shape[-1] // 2)
    y = y if residual is None else y + residual.view(-1, *size, len(weight)).permute(0, 3, 1, 2)
    y = y.relu() if relu else y
    y = y if count is None else torch.where(torch.arange(len(y), device=x.device).view(-1, 1, 1, 1) < count, y, 0)
    return y.mean((2, 3)) if mean else y.permute(0, 2, 3, 1).reshape(len(x), len(weight))


@case("conv_head", FLOAT32 + HALF, "conv_head", "fused_conv non_local", apart=True)
def conv_head(device, dtype):
    number, channels = maps(device)
    inner = channels // 2 if device == "cuda" else channels
    blocks = [Block.WIDENING, Block.NON_LOCAL, Block.BOTTLENECK]
    shapes = [(channels, channels, 3, 3), (channels, 2 * channels), (3 * inner, channels), (channels, inner),
              (inner, channels), (inner, inner, 3, 3), (channels, inner)]  # fmt: skip
    tensors = [
        tensor
        for i, shape in enumerate(shapes)
        for tensor in (weights(*shape, seed=i), normal(shape[0], seed=i, spread=0.1))
    ]
    # With a count all products are the Triton kernel's; without one a GPU's are cuBLAS's and cuDNN's too, those that
    # join two inputs from 92 RoIs on.
    for rois, count in ((number, torch.tensor(number - 1)), (100 if device == "cuda" else number, None)):
        x = normal(rois, channels, 7, 7).contiguous(memory_format=torch.channels_last)
        given = moved((x, tensors, blocks, count), dtype=dtype)
        attention = 1, False, 1 / 49, True
        plain, exact = (
            conv_head_reference.conv_head(*pack(*moved(given, *there), *attention)) for there in each(device, dtype)
        )
        with torch.no_grad():
            actual = ops.conv_head(*moved(given, device), groups=1, softmax=False, scale=1 / 49, relu=True)
        name = f"{rois} RoIs, {'all' if count is None else 'a count'}"
        yield from compare(actual, plain, exact, name, roundings=len(shapes), eps=convolution_eps(device, dtype))


@case("batch_norm_act", FLOAT32 + HALF, "batch_norm_act batch_norm_act_apply batch_norm_act_backward", "batch_norm",
      apart=True)  # fmt: skip
def batch_norm_act(device, dtype):
    number, channels = maps(device)
    x, residual, grad = (normal(number * 49, channels, seed=i).to(dtype) for i in range(3))
    given = [(1.5 * x + 0.5).to(dtype), 1 + normal(channels, spread=0.2), normal(channels), residual]

    def gradients(function, where, wide, grad, relu):
        leaves = [
            value.to(where, wide if value.dtype == dtype else max(wide, torch.float32, key=lambda d: d.itemsize))
            for value in given
        ]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y, *statistics = function(*leaves, relu)
        grads = torch.autograd.grad(y, leaves, grad.to(where, y.dtype))
        return y.detach(), statistics, grads, leaves

    def plain(x, weight, bias, residual, relu):
        return batch_norm_reference.batch_norm_act(ForwardArguments(x, weight, bias, residual, relu, 1e-5))

    ours, statistics, grads, leaves = gradients(
        lambda *t: ops.batch_norm_act(*t[:4], relu=t[4]), device, dtype, grad, True
    )
    forward = [gradients(plain, *there, grad, True)[0] for there in each(device, dtype)]
    yield from compare(ours, *forward, "forward")
    again = batch_norm_act_apply(leaves[0].detach(), *(s.detach() for s in statistics), *leaves[1:], True)
    yield "apply", differing(again.detach(), ours), 0
    # ReLU's slope jumps at 0, where rounding decides the side: every side takes our result's side.
    grad = torch.where(ours.cpu() > 0, grad, 0)
    others = [gradients(plain, *there, grad, False)[2] for there in each(device, dtype)]
    yield from compare(grads, *others, "backward", roundings=4)


@case("fuse_scores", FLOAT32 + HALF, "fuse_scores fuse_scores_backward", "score_fusion")
def fuse_scores(device, dtype):
    shape = (500, 81) if device == "cuda" else (5, 21)
    logits = [normal(*shape, seed=i, spread=3.0).to(dtype) for i in range(2)]
    grad = normal(*shape, seed=2)
    for method in ("complementary", "average"):
        ours = [value.to(device).requires_grad_() for value in logits]
        forward = OPS.fuse_scores(*ours, method)
        backward = torch.autograd.grad(forward, ours, grad.to(device))
        plain, exact = (
            score_fusion_reference.fuse_scores(*moved(logits, *there), method) for there in each(device, dtype)
        )
        yield from compare(forward.detach(), plain, exact, f"{method} forward")
        (device_grad, *given), (wide_grad, *wide) = (
            (grad.to(where, max(kind, torch.float32, key=lambda d: d.itemsize)), *moved(logits, where, kind))
            for where, kind in each(device, dtype)
        )
        plain = score_fusion_reference.fuse_scores_backward(device_grad, *given, method)
        exact = score_fusion_reference.fuse_scores_backward(wide_grad, *wide, method)
        yield from compare(backward, plain, exact, f"{method} backward")


@case("image_batch", FLOAT32 + HALF, "image_batch", "image_batch")
def image_batch(device, dtype):
    """The gradient, of floating images alone, is plain PyTorch's."""
    factor = 8 if device == "cuda" else 1
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randint(256, (3, 20 * factor, 30 * factor), dtype=torch.uint8, generator=generator),
        torch.rand(25 * factor, 24 * factor, 3, generator=generator).permute(2, 0, 1),
    ]
    sizes = [16 * factor, 24 * factor, 20 * factor, 19 * factor]
    rest = 20 * factor, 24 * factor, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], True, False
    for channels_last in (False, True):
        actual = OPS.image_batch(moved(images, device), sizes, *rest, dtype, channels_last)
        arguments = ImageBatchArguments(moved(images, device), sizes, *rest, dtype, channels_last)
        plain = image_batch_reference.image_batch(arguments)
        exact = image_batch_reference.image_batch(arguments._replace(images=images, dtype=torch.float64))
        yield from compare(actual, plain, exact, "NHWC" if channels_last else "NCHW")
