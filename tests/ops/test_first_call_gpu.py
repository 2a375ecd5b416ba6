"""The first call of an operator in a process, inside a graph capture: kernels are loaded then, and nothing is warm."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from doublehead.ops._library import native
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not native("nms_padded", "cuda"), reason="doublehead's CUDA part is not built"),
]

CAPTURE = """
import sys
import torch
import doublehead.ops
from doublehead.ops.roi_align.level_rules import LEVEL_RULES

name, device = sys.argv[1:]
generator = torch.Generator().manual_seed(0)
corners = torch.rand(2, 300, 2, generator=generator) * 50
boxes = torch.cat((corners, corners + 10), 2)
rois = torch.cat((torch.arange(600)[:, None] % 2, boxes.flatten(0, 1)), 1)
pooling = [0.5, 0.25], [1.0], [7, 7], 2, False, 56.0, 3, *LEVEL_RULES["torchvision"]

def arguments(dtype):
    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    if name == "nms_padded":
        return boxes.to(dtype), random(2, 300), torch.arange(600).view(2, 300) % 3, 0.5, 100
    if name == "detections":
        logits, deltas = [random(2, 300, 5), random(2, 300, 5)], random(2, 300, 5, 4)
        valid, sizes = torch.ones(2, 300, dtype=torch.bool), torch.tensor([[70.0, 80.0]]).expand(2, 2)
        options = "complementary", 0.9, 0.5, 20, 0.01, 0.0, [10.0, 10.0, 5.0, 5.0]
        return logits, deltas, boxes, valid, sizes, *options
    if name == "pyramid_roi_align":
        return [random(2, 16, 40, 40), random(2, 16, 20, 20)], rois, *pooling
    return [random(600, 16, 7, 7)], rois, [2, 16, 40, 40, 20, 20], True, *pooling

def move(value):
    if isinstance(value, list):
        return [move(item) for item in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value

operator = getattr(torch.ops.doublehead, name)
for dtype in (torch.float32, torch.bfloat16):
    given = arguments(dtype)
    moved = [move(value) for value in given]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        captured = operator(*moved)
    graph.replay()
    torch.cuda.synchronize(device)
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=0.02, atol=0.05)
    for actual, expected in zip(captured, operator(*given), strict=True):
        torch.testing.assert_close(actual.cpu(), expected, **tolerance)
print("replayed")
"""


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("name", ["nms_padded", "detections", "pyramid_roi_align", "pyramid_roi_align_backward"])
def test_first_call_inside_a_capture(name, device):
    if int(device[-1]) >= torch.cuda.device_count():
        pytest.skip("needs two CUDA devices")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CAPTURE, name, device],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ, PYTHONPATH=path, CUDA_MODULE_LOADING="LAZY"),
    )
    assert done.returncode == 0 and done.stdout == "replayed\n", done.stderr
