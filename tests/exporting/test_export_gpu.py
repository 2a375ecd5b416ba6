"""`doublehead export` on a GPU; without its command line, which needs tyro."""

import pytest
import torch

from doublehead.cli.export import Options, run
from doublehead.exporting import load
from tests.support.export_samples import save_tiny_ext


@pytest.mark.gpu
def test_a_package_for_cuda(tmp_path, capsys):
    """The command itself compares it with the model."""
    pytest.importorskip("safetensors")
    (tmp_path / "run").mkdir()
    run(Options(str(save_tiny_ext(tmp_path / "run")), str(tmp_path / "a.pt2"), device="cuda", batch=2))
    assert "the same " in capsys.readouterr().out
    detector = load(tmp_path / "a.pt2")
    assert detector.device == torch.device("cuda", 0)
    (found,) = detector.detect([torch.rand(3, 64, 90)])
    assert found["boxes"].is_cuda and len(found["boxes"]) > 10
