"""How detections are compared with their definition, element for element."""

from __future__ import annotations

import torch

from doublehead.ops import detections
from doublehead.ops.detections import by_class, reference
from doublehead.ops.detections.arguments import DetectionArguments
from doublehead.ops.score_fusion import FUSIONS
from tests.support.detection_cases import OPTIONS, clear
from tests.support.emulated_detections import emulated

NAN, INF = float("nan"), float("inf")
FUSION_NAMES = list(FUSIONS)


EMULATED = "emulated"
"""In place of a device: the CUDA kernels on the emulator, where they serve a call."""


def run(inputs, options, device="cpu"):
    logits, *others = inputs
    if device == EMULATED:
        args = DetectionArguments(tuple(logits), *others, **options)
        if by_class.serves(args):
            return list(emulated(args))
        device = "cpu"
    found = detections([item.to(device) for item in logits], *(item.to(device) for item in others), **options)
    return [item.cpu() for item in found]


def defined(inputs, options):
    return reference.detections(DetectionArguments(*inputs, **options))


def check(inputs, device="cpu", exact=True, **changes):
    """Calls the operator, compares it with the definition, and returns its result."""
    options = OPTIONS | changes
    expected = defined(inputs, options)
    found = run(inputs, options, device)
    assert [item.dtype for item in found] == [item.dtype for item in expected]
    assert not any(item.isnan().any() for item in found)
    if exact:
        assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))
        return found
    assert clear(inputs, options), "these inputs leave open what the result is"
    assert found[3].tolist() == expected[3].tolist() and torch.equal(found[2], expected[2])
    torch.testing.assert_close(found[1], expected[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-5)
    return found
