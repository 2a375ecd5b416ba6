"""Memory, open files and threads of a long detection and a long training level off."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

LEEWAY = 150  # MiB between the first and the last quarter: the allocator's, for pictures of many sizes
SMALL = (
    "--data.train-images 40 --data.val-images 4 --data.image-size 96 --data.workers 2 --train.batch-size 2 "
    "--train.log-every 1 --train.checkpoint-every 100 --train.warmup-steps 1 --train.milestones 3 --train.device cpu "
    "--model.backbone.fpn-channels 64 --model.head.conv-blocks 1 --model.head.non-local.no-enabled"
).split()

pytestmark = [
    pytest.mark.usefixtures("nightly"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc, which this system has not"),
]


def command(name: str, *arguments) -> list[str]:
    return [sys.executable, "-m", "doublehead", name, *map(str, arguments)]


def sample(pid: int) -> tuple[int, int, int]:
    """Resident MiB, open files, threads."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(status["VmRSS"].split()[0]) >> 10, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])


def watched(arguments: list[str], log: Path, done) -> list[tuple[int, tuple[int, int, int]]]:
    """Samples while the command runs, each with how much was `done()` by then."""
    samples = []
    with open(log, "w") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            try:
                samples.append((done(), sample(process.pid)))
            except (OSError, KeyError):  # it has just ended
                pass
            time.sleep(0.2)
    assert process.returncode == 0, log.read_text()
    return samples


def assert_levels_off(samples) -> None:
    most = max(number for number, _ in samples)
    settled = [values for number, values in samples if 0.2 * most <= number < most]
    assert len(settled) >= 20, f"only {len(settled)} samples: too short a run"
    quarter = len(settled) // 4
    ends = settled[:quarter], settled[-quarter:]
    first, last = (list(map(statistics.median, zip(*end, strict=True))) for end in ends)
    assert last[0] <= first[0] + LEEWAY, f"{first[0]} -> {last[0]} MiB"
    assert last[1] <= first[1] + 3, f"{first[1]} -> {last[1]} open files"
    assert last[2] <= first[2] + 3, f"{first[2]} -> {last[2]} threads"


def test_a_long_training(tmp_path):
    run = tmp_path / "run"
    sizes = "--model.image.min-size 64 80 96 128 --train.steps 400".split()
    log = run / "log.jsonl"

    def steps() -> int:
        return log.read_text().count("\n") if log.exists() else 0

    assert_levels_off(watched(command("train", *SMALL, *sizes, "--out", run), tmp_path / "out.txt", steps))


def test_a_long_detection(tmp_path, seeded):
    run, pictures, found = tmp_path / "run", tmp_path / "pictures", tmp_path / "found"
    subprocess.run(command("train", *SMALL, "--train.steps", 2, "--out", run), check=True, capture_output=True)
    pictures.mkdir()
    for number in range(300):
        size = seeded.randint(40, 1500), seeded.randint(40, 1500), 3
        pixels = np.full(size, seeded.randrange(256), np.uint8)
        pixels[: size[0] // 2, : size[1] // 3] = seeded.randrange(256)
        Image.fromarray(pixels).save(pictures / f"{number}.{('jpg', 'png')[number % 2]}")
    arguments = command("detect", run, pictures, "--out", found, "--score-threshold", 0.01, "--device", "cpu")
    assert_levels_off(watched(arguments, tmp_path / "out.txt", lambda: len(os.listdir(found)) if found.exists() else 0))
