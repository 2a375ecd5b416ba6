"""A disk that fills up at any moment: one line that names a file, nothing half written, a resume once there is room."""

import contextlib
import functools
import json
import os
import subprocess
from pathlib import Path

import pytest
import safetensors
import torch
from PIL import Image

from doublehead.engine.checkpoint import load_state
from tests.support.engine_standin import finish, launch, one_thread  # noqa: F401 (a fixture)
from tests.support.training_runs import OPTIONS, assert_same, contents, train

PAGE = 4096
ROOM = 1 << 24


class Disk:
    """A file system of its own in memory, `pages` large."""

    def __init__(self, path: Path, pages: int) -> None:
        self.path = path
        path.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={pages * PAGE}", "tmpfs")

    def grow(self) -> None:
        self._mount("-o", f"remount,size={ROOM}")

    def close_to_writing(self) -> None:
        self._mount("-o", "remount,ro")

    def _mount(self, *arguments: str) -> None:
        subprocess.run(["mount", *arguments, str(self.path)], check=True, capture_output=True)

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path):
    """`disk(pages)`; skipped, with the reason, where this process may not mount one."""
    number = iter(range(10**6))
    with contextlib.ExitStack() as stack:

        def make(pages: int) -> Disk:
            try:
                return stack.enter_context(Disk(tmp_path / f"disk-{next(number)}", pages))
            except (OSError, subprocess.CalledProcessError) as error:
                reason = (getattr(error, "stderr", b"") or b"").decode().strip() or error
                pytest.skip(f"needs to mount a small file system in memory, which is not allowed here ({reason})")

        yield make


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that had room."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert finish(train(folder, *OPTIONS)) == 0, folder.with_suffix(".txt").read_text()
    return folder


def pages_of(folder: Path) -> int:
    """How large a disk must be for everything in `folder`."""
    return sum(-(-path.stat().st_size // PAGE) + 1 for path in folder.rglob("*"))


def assert_said_in_one_line(log: Path, code: int) -> None:
    text = log.read_text()
    errors = [line for line in text.splitlines() if line.startswith("error")]
    assert code in (0, 1, 2) and "Traceback" not in text and len(errors) == (code != 0), text
    assert all("/" in line for line in errors), errors  # the file that found no room


def assert_whole_or_absent(folder: Path) -> None:
    left = [path.name for path in folder.rglob("*") if path.name.startswith(".") and path.suffix == ".tmp"]
    assert not left, left
    if (folder / "recipe.json").exists():
        json.loads((folder / "recipe.json").read_text())
    if (folder / "state.pt").exists():
        load_state(folder / "state.pt")
    if (folder / "model.safetensors").exists():
        with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
            assert all(file.get_tensor(name) is not None for name in file.keys())  # noqa: SIM118


def test_a_training_whose_disk_fills_up(whole, tmp_path, disk, seeded, rounds):
    most = pages_of(whole)
    for number in range(rounds(6)):
        made, log = disk(seeded.randint(1, most + 2)), tmp_path / f"{number}.txt"
        folder = made.path / "run"
        code = finish(train(folder, *OPTIONS, log=log))
        assert_said_in_one_line(log, code)
        assert_whole_or_absent(folder)
        made.grow()
        again = ["--resume", folder] if (folder / "recipe.json").exists() else OPTIONS
        assert finish(train(folder, *again, log=log)) == 0, log.read_text()
        assert_same(contents(folder), contents(whole))


def fill_at(step: int, disk: Path) -> None:
    """Another process takes all the room while optimizer step `step` runs."""
    real, seen = torch.optim.AdamW.step, []

    def one_step(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == step:
            with open(disk / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(PAGE))
        return real(self, *args, **kwargs)

    torch.optim.AdamW.step = one_step


def test_a_disk_that_another_process_fills_up(whole, tmp_path, disk, seeded, rounds):
    for number in range(rounds(2)):
        made, log = disk(3 * pages_of(whole)), tmp_path / f"{number}.txt"
        folder, step = made.path / "run", seeded.randint(4, 11)
        code = finish(train(folder, *OPTIONS, log=log, before=functools.partial(fill_at, step, made.path)))
        assert code and (folder / "state.pt").exists()
        assert_said_in_one_line(log, code)
        assert_whole_or_absent(folder)
        os.remove(made.path / "ballast")
        assert finish(train(folder, "--resume", folder, log=log)) == 0, log.read_text()
        assert_same(contents(folder), contents(whole))


def results(whole: Path, pictures: Path, out: Path) -> dict[str, list]:
    """Every command that writes, with what it writes in the folder `out`."""
    return {
        "detect": [whole, pictures, "--out", out / "found", "--device", "cpu"],
        "evaluate": [whole, "--device", "cpu", "--out", out / "r.json"],
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        Image.effect_noise((90, 60), 90).convert("RGB").save(folder / f"{number}.jpg")
    return folder


@pytest.mark.parametrize("command", ["detect", "evaluate"])
def test_results_that_find_no_room(command, whole, pictures, tmp_path, disk, seeded, rounds):
    for number in range(rounds(2)):
        made, log = disk(seeded.randint(1, 3)), tmp_path / f"{number}.txt"
        code = finish(launch(command, results(whole, pictures, made.path)[command], log))
        assert_said_in_one_line(log, code)
        assert_whole_or_absent(made.path)
        for path in made.path.rglob("*.json"):
            json.loads(path.read_text())
        for path in made.path.rglob("*.jpg"):
            Image.open(path).load()


def test_a_disk_that_is_closed_to_writing(whole, pictures, tmp_path, disk):
    made = disk(4 * pages_of(whole))
    subprocess.run(["cp", "-r", str(whole), str(made.path / "run")], check=True)
    made.close_to_writing()
    before = contents(made.path / "run")
    calls = {name: (name, arguments) for name, arguments in results(whole, pictures, made.path).items()}
    calls["resume"] = ("train", ["--resume", made.path / "run", "--train.steps", "14"])
    calls["new"] = ("train", ["--out", made.path / "new", "--train.steps", "2", "--train.device", "cpu"])
    for name, (command, arguments) in calls.items():
        log = tmp_path / f"{name}.txt"
        code = finish(launch(command, arguments, log))
        assert code == 2, (name, log.read_text())
        assert_said_in_one_line(log, code)
    assert_same(contents(made.path / "run"), before)
