"""What the tests of CUDA graphs share: pictures, the batch a graph sees, and how results are compared."""

from __future__ import annotations

import torch

from doublehead.models import graph


def pictures(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def padded(model, images, batch, height, width):
    """The batch as the bucket sees it."""
    small, _ = model.transform(images)
    buffers = graph.empty_batch(batch, height, width, "cpu")
    graph.fill(buffers, small)
    return buffers


def assert_same_but_borderline(found, expected, options, gap=1e-4):
    """Each image's scores equal the expected ones; either may have more, which passed the threshold barely.

    Scores are sorted, so that those at the threshold come last.
    """
    for image, scores in enumerate(found):
        others = expected.scores[image, : expected.count[image]].cpu()
        common = min(len(scores), len(others))
        assert common > 0
        torch.testing.assert_close(scores[:common], others[:common], rtol=0, atol=gap)
        surplus = torch.cat([scores[common:], others[common:]])
        assert surplus.le(options.score_threshold + gap).all(), surplus
