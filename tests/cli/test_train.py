"""`doublehead train`: its command line, what a run leaves behind, stopping and resuming."""

import dataclasses
import functools
import importlib
import json
import os
import random
import shutil
import signal
import time

import pytest
import safetensors.torch
import torch

from doublehead.cli.train import main, parse
from doublehead.config import TrainConfig, to_dict
from doublehead.data import DataError
from doublehead.engine.checkpoint import load_state
from doublehead.engine.errors import UserError
from doublehead.engine.logs import read_log
from doublehead.engine.schedule import notes, notes_of_more_steps, planned
from doublehead.engine.training import base_of
from doublehead.recipes import RECIPES
from tests.support.engine_standin import TINY, TinyDetector, finish, free_port, launch, one_thread  # noqa: F401 (a fixture)
from tests.support.training_runs import OPTIONS, assert_same, contents, train

# ---------------------------------------------------------------------- the command line


def test_without_arguments_it_is_the_demonstration():
    recipe, options, given, base = parse([])
    assert base == recipe and not given
    assert recipe == RECIPES["shapes-ext"] and options.out is None and options.resume is None


def test_every_field_of_a_recipe_can_be_changed():
    recipe, options, given, _ = parse(
        "shapes-ext --data.format voc --data.root /x --on-bad-record skip --train.milestones 3 4 --train.amp bf16 "
        "--train.clip_grad_norm 2 --model.head.non-local.groups 2 --model.backbone.weights None --out o".split()
    )
    assert (recipe.data.format, recipe.data.root, recipe.data.on_bad_record) == ("voc", "/x", "skip")
    assert (recipe.train.milestones, recipe.train.amp, recipe.train.clip_grad_norm) == ((3, 4), "bf16", 2.0)
    assert recipe.model.head.non_local.groups == 2 and recipe.model.backbone.weights is None
    assert given == {
        "data.format", "data.root", "data.on_bad_record", "train.milestones", "train.amp", "train.clip_grad_norm",
        "model.head.non_local.groups", "model.backbone.weights",
    }  # fmt: skip
    assert options.out == "o" and recipe.name == "shapes-ext"
    assert recipe.train.lr == RECIPES["shapes-ext"].train.lr


def test_a_flag_of_the_wrong_type_is_told_in_plain_types(capsys):
    with pytest.raises(SystemExit):
        parse(["--train.ema-decay", "much"])
    shown = capsys.readouterr().err
    assert "float" in shown and "much" in shown and "Annotated" not in shown


@pytest.mark.parametrize("flag, model", [("--help", False), ("--help-all", True)])
def test_help_lists_recipes_and_spares_the_model(flag, model, capsys):
    with pytest.raises(SystemExit) as stop:
        parse([flag])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(name in shown for name in RECIPES) and "--data.root" in shown and "--train.lr" in shown
    assert ("--model.head.kind" in shown) == model


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nonsense"], "there is no recipe 'nonsense'; the recipes are: .*shapes-ext"),
        (["--resume", "x", "--out", "y"], "x is not the folder of a run"),
        (["shapes-ext", "--resume", "x"], "leave 'shapes-ext' out"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        parse(arguments)


def test_a_resumed_run_keeps_its_recipe_model_and_folder(tmp_path):
    recipe = parse(["--train.lr", "0.125", "--model.head.fc-dim", "77"]).recipe
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    resumed, options, *_ = parse(["--resume", str(tmp_path), "--train.steps", "5000"])
    assert resumed.model == recipe.model and resumed.train.lr == 0.125 and resumed.train.steps == 5000
    with pytest.raises(UserError, match="leave the --model options out"):
        parse([f"--resume={tmp_path}", "--model.head.fc-dim", "78"])
    with pytest.raises(UserError, match="--out and --resume exclude each other"):
        parse([f"--resume={tmp_path}", "--out", "x"])


def test_steps_alone_scale_the_schedule():
    recipe = RECIPES["shapes-ext"].train
    assert (recipe.steps, recipe.milestones, recipe.warmup_steps) == (480, (345, 440), 50)

    def schedule(*arguments):
        recipe, _, given, base = parse(arguments)
        assert base_of(recipe, given) == base  # in Python, which names none
        train, _ = planned(recipe.train, base.train, given, images=2000)
        return train.milestones, train.warmup_steps

    assert schedule("--train.steps", "48") == ((34, 44), 5)
    assert schedule("--train.steps=960") == ((690, 880), 100)
    assert schedule("--train.steps", "48", "--train.warmup_steps", "20") == ((34, 44), 20)
    assert schedule("--train.steps", "48", "--train.milestones", "40") == ((40,), 50)
    assert schedule("--train.steps", "48", "--train.milestones", "345", "440") == ((345, 440), 50)
    assert schedule("--train.steps", "480") == schedule() == ((345, 440), 50)
    assert schedule("--train.steps", "1") == ((1, 1), 0)
    assert schedule("--train.epochs", "0.096") == ((34, 44), 5)  # 48 steps of 4
    with pytest.raises(UserError, match="train.steps is -3, a whole number of at least 1 is accepted"):
        schedule("--train.steps", "-3")


def test_parts_of_a_schedule_behind_the_end_are_told():
    config = TrainConfig(steps=10, milestones=(4, 10, 12), warmup_steps=11, lr=0.5)
    assert list(notes(config)) == [
        "train.milestones 10, 12: never reached in 10 steps, the learning rate does not fall there",
        "train.warmup_steps 11: longer than the 10 steps, the learning rate never reaches 0.5",
    ]
    assert not list(notes(TrainConfig(steps=10, milestones=(4, 9), warmup_steps=10)))
    more = dataclasses.replace(config, steps=20, warmup_steps=0)
    assert "fallen at 4 and goes on with 0.05;" in next(notes_of_more_steps(more, config, 6))
    assert not list(notes_of_more_steps(more, config, 3)) and not list(notes_of_more_steps(more, more, 6))
    assert not list(notes_of_more_steps(dataclasses.replace(more, milestones=(15,)), config, 6))


# ---------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert finish(train(folder, *OPTIONS, draw=True)) == 0, folder.with_suffix(".txt").read_text()
    return folder


def test_what_a_run_leaves(whole):
    folder = whole
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "recipe.json", "model.safetensors", "best.safetensors", "state.pt", "log.jsonl", "tensorboard", "metrics.json",
        "curves.png", "detections.png", "batches.png", "pr_curves.png", "confusion.png", "scores.png",
    }  # fmt: skip
    assert list((folder / "tensorboard").glob("events.*"))
    log = read_log(folder / "log.jsonl")
    assert [r["step"] for r in log if "loss" in r] == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in log if "AP" in r] == [5, 10, 12]
    first = log[0]
    assert {"step", "lr", "loss", "loss_cls", "loss_box", "images_per_second", "time"} == set(first)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["step"] == 12 and metrics["images"] == 3 and set(metrics["classes"]) >= {"disc", "star"}
    assert {"AP", "AP50", "AR100"} <= set(metrics)
    state = load_state(folder / "state.pt")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(tensor, state["average"]["model"][name])  # the averaged weights are the ones to use
    assert not torch.equal(weights["classify.weight"], state["model"]["classify.weight"])


def test_what_a_run_says(whole):
    text = whole.with_suffix(".txt").read_text()
    for words in (
        "shapes-ext", "shapes: 9 train, 3 val, 6 classes", "disc, ", "12 x 4 images, 2 accumulation steps",
        "cpu, 1 threads", "M parameters", "class", "AR100", "model.safetensors", "0:00 left",
    ):  # fmt: skip
        assert words in text, words
    assert "Traceback" not in text and len(text.splitlines()) < 40


def draw_no_batches():
    importlib.import_module("doublehead.engine.run").draw_first_batches = lambda *args: None


def test_the_sheet_of_batches_changes_nothing(whole, tmp_path):
    augmented = "--train.augment.colour 0.5 --train.augment.crop 0.5".split()
    folders = [tmp_path / "with", tmp_path / "without"]
    for folder, before in zip(folders, (None, draw_no_batches), strict=True):
        assert finish(train(folder, *OPTIONS, *augmented, before=before)) == 0, folder.with_suffix(".txt").read_text()
    assert (folders[0] / "batches.png").exists() and not (folders[1] / "batches.png").exists()
    assert_same(*(contents(folder) for folder in folders))


def test_killed_at_any_moment_it_ends_with_the_same_bits(whole, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    rng = random.Random(4)
    begun = time.monotonic()
    assert finish(train(tmp_path / "measured", *OPTIONS, log=log)) == 0  # how long a life may be
    seconds = time.monotonic() - begun
    process = train(folder, *OPTIONS, log=log)
    for _ in range(6):
        time.sleep(rng.uniform(0.1, 0.8) * seconds)
        process.kill()
        assert finish(process) in (0, -signal.SIGKILL)
        # Killed before its recipe was written, there is nothing to resume: it begins again.
        again = OPTIONS if not (folder / "recipe.json").exists() else ["--resume", folder]
        process = train(folder, *again, log=log)
    assert finish(process) == 0, log.read_text()
    assert_same(contents(folder), contents(whole))
    assert not list(folder.glob(".*"))  # no temporary file is left


def die_at_replace(name, number, after):
    """Kill this process at its `number`-th replacement of a file `name`, before or after it is done."""
    real, seen = os.replace, []

    def replace(source, target):
        hit = str(target).endswith(name)
        seen.append(1) if hit else None
        if hit and len(seen) == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
        if hit and len(seen) == number and after:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def die_in_step(number):
    """Kill this process in the middle of optimizer step `number` of its life."""
    real, seen = torch.optim.AdamW.step, []  # the demonstration's optimizer

    def step(self, *args, **kwargs):
        seen.append(1)
        if len(seen) == number:
            for parameter in self.param_groups[0]["params"]:
                parameter.data.zero_()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args, **kwargs)

    torch.optim.AdamW.step = step


def test_killed_in_steps_and_while_saving_it_ends_with_the_same_bits(whole, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    deaths = [
        functools.partial(die_in_step, 2),  # before the first checkpoint
        functools.partial(die_at_replace, "model.safetensors", 1, True),  # between model and state
        functools.partial(die_at_replace, "state.pt", 1, False),
        functools.partial(die_in_step, 5),
        functools.partial(die_at_replace, "state.pt", 1, True),  # before the evaluation of step 5
        functools.partial(die_at_replace, "best.safetensors", 1, True),  # before the log knows of that evaluation
        functools.partial(die_at_replace, "log.jsonl", 1, False),  # while the log is cut back
        functools.partial(die_in_step, 3),
        functools.partial(die_at_replace, "state.pt", 3, True),  # after the last step, before its evaluation
        functools.partial(die_at_replace, "metrics.json", 1, False),
    ]
    process = train(folder, *OPTIONS, log=log, before=deaths[0])
    steps = []
    for death in [*deaths[1:], None]:
        assert finish(process) == -signal.SIGKILL, log.read_text()
        steps.append(load_state(folder / "state.pt")["step"] if (folder / "state.pt").exists() else 0)
        process = train(folder, "--resume", folder, log=log, before=death)
    assert finish(process) == 0, log.read_text()
    assert steps[0] == 0 and steps[-1] == 12 and len(set(steps)) >= 4
    assert_same(contents(folder), contents(whole))


def test_the_number_of_loader_processes_changes_nothing(whole, tmp_path):
    folder = tmp_path / "run"
    process = train(folder, *OPTIONS, "--data.workers", "2", before=functools.partial(die_in_step, 8))
    assert finish(process) == -signal.SIGKILL
    assert finish(train(folder, "--resume", folder, "--data.workers", "1")) == 0
    mine, reference = contents(folder), contents(whole)
    assert mine.pop("header")["recipe"] != reference.pop("header")["recipe"]  # it tells of the loader processes
    assert_same(mine, reference)


def stop_in_step(number, signals):
    """Send this process `signals` in the middle of step `number`."""
    real, seen = TinyDetector.forward, []

    def forward(self, images, targets=None):
        seen.append(1) if targets is not None else None
        if len(seen) == number and targets is not None:
            for one in signals:
                os.kill(os.getpid(), one)
                time.sleep(0.01)
        return real(self, images, targets)

    TinyDetector.forward = forward


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_end_saves_and_exits(whole, tmp_path, number, code):
    folder = tmp_path / "run"
    log = folder.with_suffix(".txt")
    # Forward 7 is the first half of step 4, after which nothing is saved otherwise.
    assert finish(train(folder, *OPTIONS, before=functools.partial(stop_in_step, 7, [number]))) == code
    assert load_state(folder / "state.pt")["step"] == 4 and (folder / "model.safetensors").exists()
    lines = log.read_text().splitlines()
    saving = lines.index("saving: the running step ends first; Ctrl-C again ends without it")
    assert f"stopped at 4/12; go on with: doublehead train --resume {folder}" in lines[saving:]
    assert lines.count(lines[saving]) == 1
    assert "Traceback" not in log.read_text()
    assert finish(train(folder, "--resume", folder)) == 0, log.read_text()
    assert_same(contents(folder), contents(whole))


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    folder = tmp_path / "run"
    process = train(folder, *OPTIONS, before=functools.partial(stop_in_step, 3, [signal.SIGINT] * 2))
    assert finish(process) == -signal.SIGINT
    assert not (folder / "state.pt").exists()
    text = folder.with_suffix(".txt").read_text()
    again = f"begin again with: doublehead train --resume {folder}\n"
    assert f"stopped at 1/12 before the first checkpoint: nothing is saved yet; {again}" in text
    assert "Traceback" not in text


def stop_in_evaluation():
    real = TinyDetector.forward

    def forward(self, images, targets=None):
        if targets is None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        return real(self, images, targets)

    TinyDetector.forward = forward


def test_a_signal_during_evaluation_does_not_wait(whole, tmp_path):
    folder = tmp_path / "run"
    assert finish(train(folder, *OPTIONS, before=stop_in_evaluation), seconds=25) == 143
    text = folder.with_suffix(".txt").read_text()
    assert "stopped at 5/12; go on with: " in text and "saving" not in text  # it is saved already
    assert load_state(folder / "state.pt")["step"] == 5
    assert finish(train(folder, "--resume", folder)) == 0
    assert_same(contents(folder), contents(whole))


# ---------------------------------------------------------------------- several processes


def no_chance():
    """Nothing random in the model, nothing that depends on how a batch is shared."""
    TinyDetector.drop = 0


def pair(folder, *more, before=None):
    port = free_port()
    return [train(folder, *more, rank=rank, size=2, port=port, before=before) for rank in range(2)]


def test_two_processes_train_as_one(tmp_path):
    # SGD: where a gradient is nothing but rounding, as of a bias before batch norm, AdamW makes full steps of it.
    options = "--train.accumulate 2 --train.steps 4 --train.optimizer sgd --train.lr 0.01".split()
    one, two = tmp_path / "one", tmp_path / "two"
    assert finish(train(one, *options, before=no_chance)) == 0
    assert [finish(p) for p in pair(two, *options, before=no_chance)] == [0, 0], two.with_suffix(".txt").read_text()
    a, b = load_state(one / "state.pt"), load_state(two / "state.pt")
    for name, tensor in a["model"].items():
        if not name.startswith("features.1.") or name.endswith(("weight", "bias")):
            # Batch norm's statistics are those of the main process's images.
            torch.testing.assert_close(tensor, b["model"][name], rtol=1e-4, atol=1e-6, msg=name)
    losses = [[r["loss"] for r in read_log(f / "log.jsonl") if "loss" in r] for f in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    text = two.with_suffix(".txt").read_text()
    assert text.count("AR100") == 1 and "2 x cpu" in text  # only the main process speaks


def stop_on_rank_1(number):
    if os.environ.get("RANK") == "1":
        stop_in_step(number, [signal.SIGTERM])


def test_a_signal_to_one_process_stops_and_saves_all_and_they_resume_exactly(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    options = ["--train.ema-decay", "0.9", "--train.steps", "8"]
    assert [finish(p) for p in pair(whole, *options)] == [0, 0]
    processes = pair(folder, *options, before=functools.partial(stop_on_rank_1, 5))
    assert [finish(p) for p in processes] == [143, 143]
    assert load_state(folder / "state.pt")["step"] == 5
    assert [finish(p) for p in pair(folder, "--resume", folder)] == [0, 0], folder.with_suffix(".txt").read_text()
    assert_same(contents(folder), contents(whole))


def fail_on_rank_1():
    if os.environ.get("RANK") == "1":
        TinyDetector.forward = lambda self, images, targets=None: 1 / 0


def bad_loss_on_rank_1():
    if os.environ.get("RANK") == "1":
        real = TinyDetector.losses
        TinyDetector.losses = lambda self, *args: {n: v * float("nan") for n, v in real(self, *args).items()}


def test_a_process_that_fails_leaves_no_other_waiting(tmp_path):
    folder = tmp_path / "run"
    codes = [finish(p, seconds=60) for p in pair(folder, before=fail_on_rank_1)]
    text = folder.with_suffix(".txt").read_text()
    assert all(codes) and "ZeroDivisionError" in text
    assert text.count("Traceback") == 1  # of the process with the fault alone


def unreadable_on_rank_1(after):
    if os.environ.get("RANK") == "1":
        real, seen = TinyDetector.forward, []

        def forward(self, images, targets=None):
            seen.append(1)
            if len(seen) > after and (targets is None) == (after > 99):
                raise DataError("a.png: cannot be decoded")
            return real(self, images, targets)

        if after > 99:
            seen.extend([1] * after)
        TinyDetector.forward = forward


@pytest.mark.parametrize("after", [3, 100], ids=["in a step", "in the evaluation"])
def test_what_one_process_cannot_read_is_said_once_and_last(tmp_path, after):
    folder = tmp_path / "run"
    codes = [finish(p, 60) for p in pair(folder, before=functools.partial(unreadable_on_rank_1, after))]
    text = folder.with_suffix(".txt").read_text()
    assert codes[1] == 2 and codes[0], text
    assert text.count("error") == 1 and "error (rank 1): a.png: cannot be decoded\n" in text, text
    assert "Traceback" not in text and "gloo" not in text


def test_a_killed_process_is_told_of_in_one_line(tmp_path):
    folder = tmp_path / "run"
    codes = [finish(p, 60) for p in pair(folder, before=killed_on_rank_1)]
    text = folder.with_suffix(".txt").read_text()
    assert codes == [1, -signal.SIGKILL], text
    assert "error: another process of this job died, killed or with its machine (" in text
    assert "Traceback" not in text


def killed_on_rank_1():
    if os.environ.get("RANK") == "1":
        die_in_step(3)


def test_a_bad_loss_of_one_process_is_named_by_all(tmp_path):
    folder = tmp_path / "run"
    assert [finish(p) for p in pair(folder, before=bad_loss_on_rank_1)] == [1, 1]
    text = folder.with_suffix(".txt").read_text()
    assert text.count("step 1: loss_cls = nan, loss_box = nan; images with ids") == 1 and "Traceback" not in text


def test_a_folder_that_cannot_be_used_stops_all(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "file").touch()
    assert [finish(p) for p in pair(folder)] == [2, 2]
    assert folder.with_suffix(".txt").read_text().count("already holds files") == 1


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "options, message",
    [
        (["--train.batch-size", "5", "--train.accumulate", "2"], "train.batch_size 5 images cannot be shared"),
        (["--data.format", "coco"], "data.root"),
        (["--data.format", "voc", "--data.root", "/nowhere"], "/nowhere"),
        (["--train.device", "cuda:77"], "cuda"),
        (["--train.ema-decay", "2"], "train.ema_decay is 2.0"),
    ],
)
def test_mistakes_are_told_without_a_traceback(tmp_path, options, message):
    folder = tmp_path / "run"
    process = train(folder, *options)
    assert finish(process) == 2
    text = folder.with_suffix(".txt").read_text()
    assert message in text and "Traceback" not in text and text.startswith("error: ")
    assert not folder.exists()  # nothing was begun, nothing is left


def test_a_run_that_never_began_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["bccd-small", "--data.root", "nowhere", "--train.device", "cpu"])
    assert "nowhere" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def break_the_model():
    TinyDetector.forward = lambda self, images, targets=None: 1 / 0


def run_out_of_disk():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))


def test_bugs_keep_their_traceback_and_a_full_disk_has_none(tmp_path):
    folder = tmp_path / "bug"
    assert finish(train(folder, before=break_the_model)) == 1
    assert "ZeroDivisionError" in folder.with_suffix(".txt").read_text()
    folder = tmp_path / "full"
    assert finish(train(folder, before=run_out_of_disk)) == 2
    text = folder.with_suffix(".txt").read_text()
    assert "cannot be written" in text and "Traceback" not in text


def two_threads():
    torch.set_num_threads(2)


def test_resuming_in_other_circumstances_is_noted(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    assert finish(train(folder, "--resume", folder)) == 0
    assert "note:" not in folder.with_suffix(".txt").read_text()
    assert finish(train(folder, "--resume", folder, before=two_threads)) == 0
    assert "note: 1 -> 2 threads: the run goes on" in folder.with_suffix(".txt").read_text()


def test_an_unknown_recipe_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["nonsense"])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: there is no recipe")


def test_a_damaged_state_is_named(whole, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.json").write_text((whole / "recipe.json").read_text())
    (folder / "state.pt").write_bytes(b"garbage" * 100)
    assert finish(train(folder, "--resume", folder)) == 2
    assert f"error: {folder}/state.pt: not a training state" in folder.with_suffix(".txt").read_text()
