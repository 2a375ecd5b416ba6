"""On a machine that has little more than torch, every test of the kernels is found; gpu.sh says what it does not do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FILES = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if path != Path(__file__)]
BARE = ("-p", "tests.support.bare_machine")
GPU, TRITON = "mark\\.gpu", "triton_kernels"


def containing(expression: str) -> list[Path]:
    files = [path for path in FILES if re.search(expression, path.read_text())]
    assert len(files) > 5
    return files


def collected(files: list[Path], *options: str) -> list[str]:
    """The tests of the files that pytest finds, in a process of its own; with "gpu: " before those marked so, again."""
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.support.list_gpu_tests"]
    command += ["--collect-only", "-q", *options, *map(str, files)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_every_test_of_a_kernel_is_found_without_the_other_packages():
    """All those marked `gpu`, and those of Triton's kernels, but for some that need Hypothesis."""
    gpu, triton = containing(GPU), containing(TRITON)
    with ThreadPoolExecutor() as threads:  # each waits for a process that mostly imports
        found = [threads.submit(collected, *of) for of in ((gpu,), ([*{*gpu, *triton}], *BARE))]
    everything, bare = (future.result() for future in found)
    marked = [{line for line in lines if line.startswith("gpu: ")} for lines in (everything, bare)]
    assert marked[0] == marked[1] and len(marked[0]) > 500
    files = {str(path.relative_to(ROOT)) for path in triton}
    assert len([line for line in bare if line.partition("::")[0] in files]) > 500


# ---------------------------------------------------------------------------------------------
# gpu.sh, with a Python that does as it is told

FAKE = """#!/usr/bin/env bash
case "$*" in
  *"-c import sys, torch"*) exit ${FAKE_NO_GPU:-0} ;;
  *"-c import xdist"*) exit 1 ;;
  *smoke.py*) echo smoke ran; exit 1 ;;
  *headline.py*) echo THE TABLE ;;
  *test_bench_nms*) sleep 60 ;;
  *) echo "ran $*" ;;
esac
"""


@pytest.fixture
def gpu_sh(tmp_path):
    """gpu_sh(*stages, **environment): status, output and errors."""
    python = tmp_path / "python"
    python.write_text(FAKE)
    python.chmod(0o755)

    def run(*stages, **environment):
        environment = os.environ | {"PYTHON": str(python)} | environment
        command = [str(ROOT / "benchmarks" / "gpu.sh"), *stages]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout, done.stderr

    return run


def test_all_failures_are_named_and_the_table_comes_last(gpu_sh):
    status, output, errors = gpu_sh("smoke", "headline", "nms", "plot", STAGE_SECONDS="2")
    assert status == 1
    assert "failed: smoke (status 1)\nfailed: nms (stopped after 2 s)" in errors
    assert "== nms: stopped after 2 s" in output and "ran benchmarks/plot.py" in output
    assert output.rstrip().endswith("== headline, again\nTHE TABLE")


def test_a_missing_tool_is_no_success(gpu_sh, tmp_path):
    for tool in ("bash", "grep", "timeout", "mktemp", "rm", "sed", "dirname", "tee", "cat", "env"):
        for folder in ("/usr/bin", "/bin"):
            if (Path(folder) / tool).exists() and not (tmp_path / tool).exists():
                (tmp_path / tool).symlink_to(Path(folder) / tool)
    status, _, errors = gpu_sh("sanitize_racecheck", PATH=str(tmp_path))
    assert status == 1 and "compute-sanitizer is not on PATH: nothing checked" in errors
    assert "failed: sanitize_racecheck (status 1)" in errors


def test_without_a_gpu_every_stage_says_so(gpu_sh):
    helped, text, _ = gpu_sh("--help")
    assert helped == 0
    stages = [name for name in re.findall(r"^([a-z_, ]+?)(?:  .*)?$", text, re.M)]
    stages = [name.strip() for line in stages for name in line.split(",") if re.fullmatch(r" ?[a-z_]+", name)]
    assert {"build", "smoke", "headline", "test", "triton", "sanitize_initcheck", "detector", "plot"} <= set(stages)
    others = [stage for stage in stages if stage not in ("build", "smoke")]
    status, output, errors = gpu_sh(*others, FAKE_NO_GPU="1")
    assert status == 0, errors
    assert output.count("no GPU: nothing checked") == len(others)


def test_an_unknown_stage_is_named(gpu_sh):
    status, _, errors = gpu_sh("smoke", "nonsense")
    assert status == 2 and "no stage 'nonsense'" in errors
