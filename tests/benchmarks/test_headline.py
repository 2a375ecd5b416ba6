"""benchmarks/headline.py at tiny sizes, and what it says without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.support.paths import BENCHMARKS

pytest.importorskip("torchvision")
SCRIPT = BENCHMARKS / "headline.py"


def run(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


def test_without_a_gpu_nothing_is_measured():
    done = run()
    assert done.returncode == 0 and "no GPU: nothing measured" in done.stdout


def test_every_call_of_the_rows_is_tried_at_tiny_sizes(tmp_path):
    """The cheap rows; what they call alone on a device is called here too."""
    rows = ["roi_forward", "roi_forward_nchw", "roi_backward", "nms_4000", "nms_80x1000", "detections"]
    out = tmp_path / "page.json"
    done = run("--device", "cpu", "--small", "--seconds", "100", "--rows", *rows, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    page = json.loads(out.read_text())
    assert [row["row"] for row in page["rows"]] == rows
    assert all(row["status"] == "measured" and row["ours_us"] > 0 and row["peer_us"] > 0 for row in page["rows"])
    assert done.stdout.count("RoIAlign forward 7x7, 512 boxes") == 2  # as it came, and in the page at the end


def test_the_state_after_the_last_row_is_saved(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import headline

    said = [{"row": "nms_4000", "status": "skipped", "why": "a test"}, {"about": {"state_after": "warm"}}]
    child = "\n".join(f"print({headline.MARK + json.dumps(message)!r})" for message in said)
    out = tmp_path / "page.json"
    page = headline.Run(headline.parse(["--rows", "nms_4000", "--out", str(out)]), [sys.executable, "-c", child])
    assert page.measure() and json.loads(out.read_text())["state_after"] == "warm"


def test_rows_without_time_are_named():
    done = run("--device", "cpu", "--small", "--seconds", "0.01", "--rows", "nms_4000", "detections")
    assert "Traceback" not in done.stderr and done.stdout.lower().count("skipped") >= 2


def test_an_unknown_row_is_refused():
    done = run("--rows", "nms_5000")
    assert done.returncode == 2 and "nms_5000" in done.stderr


def test_the_headline_cases_are_timed_by_default():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "--benchmark-only"]
    # Of pytest-xdist, the benchmarks' plugin would take the variables for its own.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = inherited | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    root = SCRIPT.parents[1]
    done = subprocess.run([*command, "benchmarks"], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+)/(\d+) tests collected \((\d+) deselected\)", done.stdout)
    assert found and 10 <= int(found[1]) < int(found[2]) / 2, done.stdout
