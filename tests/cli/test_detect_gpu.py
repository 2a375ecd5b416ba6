"""`doublehead detect` on a GPU; without its command line, which needs tyro."""

import json
import sys

import pytest
import torch

from doublehead.cli.detect import Options, run
from tests.support.detect_samples import many, save_tiny_detector
from tests.support.engine_standin import tiny_models


@pytest.mark.gpu
def test_a_gpu_finds_the_same(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.setitem(sys.modules, "doublehead.models", tiny_models())
    saved, folder = save_tiny_detector(tmp_path / "run"), many(tmp_path / "in")
    answers = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        unreadable = run(
            Options(str(saved), (str(folder),), out=str(out), score_threshold=0.0, batch_size=2, device=device)
        )
        assert unreadable
        answers.append(json.loads((out / "detections.json").read_text())["pictures"])
    for ours, theirs in zip(*answers, strict=True):
        for key in ("box", "score"):
            values = [torch.tensor([d[key] for d in entry["detections"]]) for entry in (ours, theirs)]
            torch.testing.assert_close(*values, atol=1e-2, rtol=1e-3)
