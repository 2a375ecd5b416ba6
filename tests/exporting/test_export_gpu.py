"""`doublehead export` on a GPU; without its command line, which needs tyro."""

import subprocess
import sys

import pytest

from tests.support.export_samples import save_tiny_ext
from tests.support.paths import ROOT

EXPORT_AND_DETECT = """
import sys
import torch
from doublehead.cli.export import Options, run
from doublehead.exporting import load

folder, package = sys.argv[1:]
run(Options(folder, package, device="cuda", batch=2))
detector = load(package)
assert detector.device == torch.device("cuda", 0)
(found,) = detector.detect([torch.rand(3, 64, 90)])
assert found["boxes"].is_cuda and len(found["boxes"]) > 10
"""


@pytest.mark.gpu
def test_a_package_for_cuda(tmp_path):
    """The command itself compares it with the model. In a process of its own: a bad package ends the one it runs in."""
    pytest.importorskip("safetensors")
    (tmp_path / "run").mkdir()
    folder, package = save_tiny_ext(tmp_path / "run"), tmp_path / "a.pt2"
    code = "import tests.support.standins as s; s.install()\n" + EXPORT_AND_DETECT  # tyro may be missing
    command = [sys.executable, "-X", "faulthandler", "-c", code, folder, package]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-5000:]}"
    assert "the same " in done.stdout
