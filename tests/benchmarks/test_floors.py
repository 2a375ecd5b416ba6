"""The least bytes that the benchmarks count, against what is touched indeed: where a gradient arrives."""

import pytest
import torch
from torch.nn.functional import interpolate

from doublehead.ops import MultiScaleRoIAlign
from doublehead.ops.roi_align import reference
from doublehead.ops.roi_align.level_rules import LEVEL_RULES
from doublehead.ops.roi_align.pooling import Pooling
from tests.support.paths import ROOT


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pytest.importorskip("torchvision")
    import floors
    import pyramid

    return floors, pyramid


def problem(pyramid, **options):
    small = pyramid.Problem(False, **options)
    if options.get("images", 1) > 1:
        return small
    # Larger than 448 pixels: the coarsest level, whose samples lie more than two pixels apart. And over the border.
    more = torch.tensor([[0.0, 3, 5, 1900, 130], [0, -30, -20, 40, 60], [0, 150, 90, 260, 190], [0, 8, 8, 8, 8]])
    small.rois = torch.cat([small.rois.cpu(), more]).to(small.rois)
    small.grad = small.grad.new_zeros(len(small.rois), *small.grad.shape[1:])
    return small


def pool(pyramid, features, rois, size):
    pooling = Pooling(pyramid.SCALES, (1.0,), (size, size), 2, False, 224.0, 4, *LEVEL_RULES["torchvision"])
    return reference.multiscale_roi_align(features, rois, pooling)[0]


@pytest.mark.parametrize("options", [{}, {"output_size": 14}, {"images": 2}, {"dtype": torch.bfloat16}], ids=str)
def test_roi_align_forward_counts_the_pixels_with_a_weight(bench, options):
    _, pyramid = bench
    it = problem(pyramid, **options)
    # One channel stands for all; weights are never negative, so what has one gets a gradient; a rounding is none.
    features = [f.detach()[:, :1].double().cpu().requires_grad_() for f in it.features]
    out = pool(pyramid, features, it.rois.double().cpu(), it.output_size)
    pixels = sum(int((g > 1e-9).sum()) for g in torch.autograd.grad(out.sum(), features))
    written = out.numel() * it.channels
    assert it.forward_bytes() == (pixels * it.channels + written) * it.dtype.itemsize


def test_roi_align_backward_counts_every_gradient_once(bench):
    _, pyramid = bench
    it = pyramid.Problem(False, images=2, dtype=torch.bfloat16)
    out = it.module(MultiScaleRoIAlign)()
    grads = torch.autograd.grad(out, it.features, it.grad)
    tensors = (it.grad, *grads)
    assert it.backward_bytes() == sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("old, new", [(480, 800), (640, 1067), (3000, 800), (4000, 1067), (100, 100), (7, 3), (1, 5)])
def test_resizing_counts_the_pixels_with_a_weight(bench, old, new):
    floors, _ = bench
    x = torch.ones(1, 1, 1, old, dtype=torch.float64, requires_grad=True)
    y = interpolate(x, (1, new), mode="bilinear", align_corners=False)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert floors.resize_touched(old, new) == int((gradient > 1e-9).sum())
    assert floors.resize_bytes((old, 20), (new, 20), 3) == floors.resize_touched(old, new) * 20 * 3
