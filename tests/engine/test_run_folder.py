"""The folder of a run: one training at a time, and a resume that goes on with its own run or leaves all as it was."""

import dataclasses
import errno
import json
import shutil
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from doublehead.engine import lock, run
from doublehead.engine.checkpoint import load_state
from doublehead.engine.distributed import World
from doublehead.engine.errors import PeerLostError, UserError
from doublehead.engine.files import new_run_folder
from doublehead.engine.lock import LOCK_FILE, FolderLock
from doublehead.engine.logs import read_log
from doublehead.engine.trainer import Trainer
from doublehead.recipes import RECIPES
from tests.support.engine_standin import TINY, checksums, finish, launch, one_thread, tiny_models, tiny_program  # noqa: F401 (a fixture)

HOLDER = """
import sys, time
from doublehead.engine.lock import FolderLock
FolderLock(sys.argv[1]).acquire()
assert "torch" not in sys.modules  # or this test takes its time
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def tiny(monkeypatch):
    """Trainings: `tiny(arguments)` gives the exit code."""
    return tiny_program(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of four steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    log = folder.with_suffix(".txt")
    assert finish(launch("train", [*TINY, "--train.steps", "4", "--out", folder], log)) == 0, log.read_text()
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


def edit_state(folder, **changes):
    state = torch.load(folder / "state.pt", weights_only=True)
    state = {name: value for name, value in (state | changes).items() if name == "average" or value is not None}
    torch.save(state, folder / "state.pt")


# ---------------------------------------------------------------------- one training a folder


def test_a_wrong_recipe_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "doublehead.models", tiny_models())
    recipe = RECIPES["shapes-ext"]
    roi = dataclasses.replace(recipe.model.roi, samples=0)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, roi=roi))
    with pytest.raises(UserError, match="model.roi.samples is 0, a whole number of at least 1 is accepted"):
        run.train(recipe, tmp_path, World())
    assert not list(tmp_path.iterdir())


def test_a_lock_names_its_holder_and_ends_with_it(holder, tmp_path):
    with pytest.raises(UserError, match=rf"in use by another training \(process {holder.pid} on \S+, since 2\d{{3}}-"):
        FolderLock(tmp_path).acquire()
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK_FILE).exists()  # of no meaning now
    mine = FolderLock(tmp_path)
    assert mine.acquire() is None
    with pytest.raises(UserError, match="another training of this process"):
        FolderLock(tmp_path).acquire()
    mine.release()
    assert not (tmp_path / LOCK_FILE).exists()
    again = FolderLock(tmp_path)
    assert again.acquire() is None
    again.release()


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    real, stolen = lock.fcntl.lockf, []

    def lockf(*args):  # the last holder ends between our opening and our locking of its file
        if not stolen:
            stolen.append((tmp_path / LOCK_FILE).unlink())
        return real(*args)

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    mine = FolderLock(tmp_path)
    mine.acquire()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"]
    mine.release()


def test_where_there_are_no_locks_it_says_so_and_goes_on(tmp_path, tiny, monkeypatch, capsys):
    def lockf(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    assert tiny(*TINY, "--train.steps", "1", "--out", tmp_path / "run") == 0
    assert "note: " in (said := capsys.readouterr().out) and "no file lock (No locks available)" in said
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_a_folder_in_use_is_left_alone(folder, tiny, capsys):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True)
    try:
        holder.stdout.readline()
        before = checksums(folder)
        assert tiny("--resume", folder, "--train.steps", "6") == 2
        assert f"in use by another training (process {holder.pid}" in capsys.readouterr().err
        assert checksums(folder) == before
    finally:
        holder.kill()
        holder.communicate()


def test_of_two_trainings_started_at_once_one_has_the_folder(tmp_path):
    arguments = [*TINY, "--train.steps", "30", "--train.log-every", "1", "--out", tmp_path / "run"]
    logs = [tmp_path / "0.txt", tmp_path / "1.txt"]
    codes = [finish(process) for process in [launch("train", arguments, log) for log in logs]]
    assert sorted(codes) == [0, 2], [log.read_text() for log in logs]
    refused = logs[codes.index(2)].read_text()
    assert ("in use by another" in refused or "already holds files" in refused) and "Traceback" not in refused
    assert [r["step"] for r in read_log(tmp_path / "run" / "log.jsonl") if "loss" in r] == list(range(1, 31))


def test_what_an_aborted_start_leaves_does_not_take_the_folder(tmp_path, tiny):
    for name in (LOCK_FILE, ".recipe.json.tmp"):
        (tmp_path / name).touch()
    assert new_run_folder("name", tmp_path) == tmp_path
    assert tiny(*TINY, "--train.steps", "1", "--out", tmp_path) == 0
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------------- whose run it is


def lose_state(folder):
    (folder / "state.pt").unlink()


def lose_model_too(folder):
    lose_state(folder)
    (folder / "model.safetensors").unlink()


def only_the_best_is_left(folder):
    (folder / "model.safetensors").rename(folder / "best.safetensors")
    for name in ("state.pt", "metrics.json"):
        (folder / name).unlink()


def only_pictures_are_left(folder):
    lose_model_too(folder)
    (folder / "metrics.json").unlink()


def converted(folder):
    """As `doublehead convert` leaves it: no data are known."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.name not in ("recipe.json", "model.safetensors"):
            path.unlink()
    recipe = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps({"name": "torchvision", "model": recipe["model"]}))


def detections(folder):
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.unlink()
    (folder / "detections.json").write_text("[]")


def swap_recipe(folder):
    path = folder / "recipe.json"
    path.write_text(path.read_text().replace('"fc_dim": 256', '"fc_dim": 128'))


def other_classes(folder):
    run = load_state(folder / "state.pt")["run"]
    names = run["classes"]
    edit_state(folder, run=run | {"classes": [names[1], names[0], *names[2:]]})


def other_images(folder):
    run = load_state(folder / "state.pt")["run"]
    edit_state(folder, run=run | {"files": "0" * 64, "images": 8})


def fewer_classes_in_the_model_of_an_old_state(folder):
    edit_state(folder, run=None)
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header["classes"] = json.dumps(["disc", "square"])
    safetensors.torch.save_file(tensors, folder / "model.safetensors", header)


@pytest.mark.parametrize(
    "change, options, message",
    [
        (lose_state, [], r"no state.pt .* from its weights: doublehead train --recipe \S+recipe.json --from \S+run$"),
        (lose_model_too, [], "has metrics.json but no state.pt .*: doublehead train --recipe .*recipe.json$"),
        (only_the_best_is_left, [], r"best.safetensors but .*doublehead train --recipe \S+ --from \S+/best.safe"),
        (only_pictures_are_left, [], "has detections.png but no state.pt .*: doublehead train --recipe .*recipe.json$"),
        (converted, [], r"has model.safetensors but no state.pt .*: doublehead train --from \S+run --data.root DIR$"),
        (converted, ["--train.steps", "5"], r"but no state.pt .*: doublehead train --from \S+run --data.root DIR$"),
        (detections, [], "is not the folder of a run: .*recipe.json cannot be read"),
        (None, ["--train.steps", "3"], "has done 4 steps already, more than train.steps 3: give --train.steps 4 or "),
        (None, ["--train.steps", "1"], r"or begin another run from its weights: doublehead train --recipe \S+ --from"),
        (None, ["--data.val-images", "2"], r"finished, .*val_images 3 -> 2.*: doublehead evaluate \S+run --data.val-"),
        (None, ["--train.steps", "6", "--train.seed", "7"], "holds another run: train.seed is 0 there, not 7"),
        (None, ["--train.batch-size", "2"], "train.batch_size is 4 there, not 2"),
        (None, ["--train.momentum", "0.5"], "train.momentum is 0.9 there, not 0.5"),
        (None, ["--data.train-images", "8"], "data.train_images is 9 there, not 8"),
        (swap_recipe, [], "model.head.fc_dim is 256 there, not 128"),
        (other_classes, [], "other classes: class 1 is 'square' there and 'disc' in the data"),
        (other_classes, ["--train.steps", "3"], "other classes: class 1 is 'square' there"),
        (other_images, [], "trained on other images: 8 then, 9 now"),
        (fewer_classes_in_the_model_of_an_old_state, [], "other classes: 2 there, 6 in the data"),
        (lambda folder: shutil.rmtree(folder / "tensorboard") or (folder / "tensorboard").touch(), [],
         "tensorboard is not a folder"),
        (lambda folder: (folder / "log.jsonl").unlink() or (folder / "log.jsonl").mkdir(), [],
         "log.jsonl is not a file"),
    ],
)  # fmt: skip
def test_a_resume_of_anything_else_is_refused_and_changes_nothing(folder, tiny, capsys, change, options, message):
    if change:
        change(folder)
    before = checksums(folder)
    assert tiny("--resume", folder, *options) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ")
    with pytest.raises(UserError, match=message):
        raise UserError(said)
    assert checksums(folder) == before


def test_what_may_change_does_and_is_said(folder, tiny, capsys):
    edit_state(folder, run=None)  # as earlier versions wrote it
    assert tiny("--resume", folder, "--train.steps", "5", "--train.lr", "0.5", "--data.val-images", "2") == 0
    said = capsys.readouterr().out
    assert "note: changed from here on: data.val_images 3 -> 2, train.steps 4 -> 5, train.lr 0.001 -> 0.5\n" in said
    state = load_state(folder / "state.pt")
    assert state["step"] == 5 and state["run"]["images"] == 9
    assert json.loads((folder / "recipe.json").read_text())["train"]["lr"] == 0.5


def test_what_a_refusal_of_the_data_advises_may_change(folder, tiny):
    options = "--data.on-bad-record skip --data.max-skipped 0.5 --data.max-pixels 120000000 --data.outside-root".split()
    edit_state(folder, run=None)  # of an earlier version, which had no such limits
    assert tiny("--resume", folder, *options) == 0
    assert tiny("--resume", folder) == 0
    assert json.loads((folder / "recipe.json").read_text())["data"]["max_skipped"] == 0.5


def test_a_finished_run_is_evaluated_again_and_a_lost_model_comes_back(folder, tiny, capsys):
    keep = (folder / "model.safetensors").read_bytes(), (folder / "state.pt").read_bytes()
    (folder / "model.safetensors").unlink()
    assert tiny("--resume", folder) == 0
    assert "all done: the results are made again" in capsys.readouterr().out
    weights = [safetensors.torch.load(data) for data in (keep[0], (folder / "model.safetensors").read_bytes())]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert (folder / "state.pt").read_bytes() == keep[1]


def test_the_sheet_of_batches_is_drawn_once(folder, tiny, capsys):
    sheet = folder / "batches.png"
    sheet.write_bytes(b"mine")
    assert tiny("--resume", folder, "--train.steps", "5") == 0
    assert sheet.read_bytes() == b"mine" and "batches " not in capsys.readouterr().out
    sheet.unlink()
    assert tiny("--resume", folder) == 0  # nothing is trained: nothing to show
    assert not sheet.exists()
    assert tiny("--resume", folder, "--train.steps", "6") == 0
    assert sheet.exists() and f"batches  the first ones: {sheet}\n" in capsys.readouterr().out


def test_a_sheet_that_cannot_be_written_is_one_line(tmp_path, tiny, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "draw_first_batches", full)
    assert tiny(*TINY, "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert said.endswith("batches.png: cannot be written: No space left on device\n") and said.count("\n") == 1


def test_the_files_of_the_results_are_named(folder, tiny, capsys):
    assert tiny("--resume", folder) == 0
    named = capsys.readouterr().out.splitlines()[-1].removeprefix(f"{folder}: ").split(", ")
    assert set(named) >= {"model.safetensors", "log.jsonl", "metrics.json", "detections.png"}
    assert all((folder / name).exists() for name in named if name != "curves.png")  # not drawn here


def test_a_run_stopped_before_its_first_state_begins_again(folder, tiny):
    for path in folder.iterdir():
        if path.name not in ("recipe.json", "log.jsonl", "tensorboard"):
            path.unlink()
    assert tiny("--resume", folder) == 0
    assert [r["step"] for r in read_log(folder / "log.jsonl") if "loss" in r] == [2, 4]
    assert not list(folder.glob(".*"))


def test_a_resumed_model_needs_no_file_of_its_backbone(folder, tiny, monkeypatch):
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["model"]["backbone"]["weights"] = "gone.safetensors"
    (folder / "recipe.json").write_text(json.dumps(recipe))
    monkeypatch.setitem(sys.modules, "doublehead.models", tiny_models(built := []))
    assert tiny("--resume", folder) == 0
    assert built[0].backbone.weights is None


# ---------------------------------------------------------------------- stopping


def test_a_stop_before_the_first_step_says_so(tmp_path, tiny, monkeypatch, capsys, folder):
    def stop(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("doublehead.engine.fitting.open_splits", stop)
    monkeypatch.chdir(tmp_path)
    assert tiny(*TINY, "--out", "new") == 143
    assert "stopped before the first step: nothing is saved; start it again" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    before = checksums(folder)
    assert tiny("--resume", "run") == 143
    command = "go on with: doublehead train --resume run\n"
    assert f"stopped before the first step: run is as it was; {command}" in capsys.readouterr().err
    assert checksums(folder) == before


def test_a_lost_process_is_named_though_torchrun_stops_the_others_at_once(folder, tiny, monkeypatch, capsys):
    def lost(self, error):
        signal.raise_signal(signal.SIGTERM)  # torchrun's, while this process looks what became of the other
        if isinstance(error, RuntimeError):
            raise PeerLostError("another process of this job is gone")

    def broken(self):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(World, "give_way", lost)
    monkeypatch.setattr(Trainer, "fit", broken)
    fallen_through = []
    before = signal.signal(signal.SIGTERM, lambda *args: fallen_through.append(args))
    try:
        assert tiny("--resume", folder) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    stopped, error = capsys.readouterr().err.splitlines()
    assert stopped.startswith("stopped at 4/4: all steps are saved; measure the model with: doublehead train --resume")
    assert error == "error: another process of this job is gone" and not fallen_through
