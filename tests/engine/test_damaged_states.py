"""Training states with anything missing, mistyped or damaged: refused in one line, and nothing is taken of them."""

import copy
import dataclasses
import math
import shutil
import sys
import zipfile

import pytest
import torch

from doublehead.cli import train
from doublehead.engine import charts, pictures
from doublehead.engine.checkpoint import load_state, save_state
from doublehead.engine.errors import NonFiniteLossError, UserError
from doublehead.engine.state import STATE
from doublehead.engine.trainer import Trainer
from tests.support.damaged_files import damaged
from tests.support.engine_standin import TINY, TinyDetector, one_thread, tiny_models  # noqa: F401 (a fixture)
from tests.support.training_cases import CONFIG, batches

MACHINE = {"processes": 1, "threads": 1, "device": "cpu"}
OPTIMIZERS = {"sgd": {}, "adamw": {"optimizer": "adamw", "lr": 1e-3}, "fp16": {"amp": "fp16"}}
SWITCHES = {"nesterov", "maximize", "foreach", "differentiable", "fused", "amsgrad", "capturable", "initial_lr",
            "decoupled_weight_decay"}  # fmt: skip


def trained(kind):
    """A trainer after two steps, and its state as a file holds it."""
    torch.manual_seed(1)
    config = dataclasses.replace(CONFIG, steps=2, ema_decay=0.9, **OPTIMIZERS[kind])
    trainer = Trainer(TinyDetector(3), config, batches)
    trainer.fit()
    return trainer, {"format": "doublehead.state/1", **copy.deepcopy(trainer.state_dict()), "machine": MACHINE}


@pytest.fixture(scope="module", params=OPTIMIZERS)
def going(request):
    return trained(request.param)


def places(value, path=()):
    """Every place in a nested value: the names and indices that lead to it."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for name, content in inner:
        yield from places(content, (*path, name))


def with_change(value, path, change):
    """`value` with `change(what is there)` at `path`; without the entry if that is KeyError."""
    name, rest = path[0], path[1:]
    changed = dict(value) if isinstance(value, dict) else list(value)
    new = with_change(value[name], rest, change) if rest else change(value[name])
    if new is KeyError:
        del changed[name]
    else:
        changed[name] = new
    return changed


WRONG = {
    "missing": lambda value: KeyError,
    "nothing": lambda value: None,
    "text": lambda value: "two" if not isinstance(value, str) else "",
    "negative": lambda value: -7,
    "huge": lambda value: 10**400,
    "not a number": lambda value: math.nan,
    "a list": lambda value: ["two"],
    "a tensor": lambda value: torch.ones(3, 5, 2),
}
WRONG_TENSORS = {
    "another shape": lambda t: torch.zeros(*t.shape, 2),
    "another type": lambda t: t.to(torch.float16 if t.dtype != torch.float16 else torch.float32),
    "NaN": lambda t: torch.full_like(t, math.nan),
    "infinite": lambda t: torch.full_like(t, math.inf),
    "expanded": lambda t: torch.zeros((), dtype=t.dtype).expand(t.shape),
    "sparse": lambda t: t.to_sparse(),
    "without data": lambda t: t.to("meta"),
}


def is_right(path, kind, value):
    """Whether what a change makes is a state too."""
    if path == ("average",):
        return kind == "nothing"  # no averaging so far
    if path[:2] == ("optimizer", "param_groups") and path[-1] in SWITCHES:
        return kind in ("missing", "nothing")  # another version of PyTorch may not know it
    if path[:2] == ("optimizer", "state") and path[-1] == "step" and kind == "another type":
        return True
    if isinstance(value, torch.Tensor):
        elements = value.numel()
        return (kind == "expanded" and elements < 2) or (kind in ("NaN", "infinite") and not value.is_floating_point())
    return path[:3] == ("losses", "sums") and kind == "missing" or path == ("scaler",) and value == {}


def changes(state):
    for path in places(state):
        value = state
        for name in path:
            value = value[name]
        kinds = WRONG | (WRONG_TENSORS if isinstance(value, torch.Tensor) else {})
        for kind, change in kinds.items():
            if not is_right(path, kind, value):
                yield path, kind, change


def refusal(trainer, state):
    """What is said about a state; None if it is taken."""
    try:
        STATE(state, "")
        trainer.load_state_dict(state)
    except (UserError, ValueError) as error:
        return str(error)
    return None


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_every_entry_is_needed_as_it_is(going):
    trainer, state = going
    assert refusal(trainer, state) is None
    before, tried = copy.deepcopy(trainer.state_dict()), 0
    for path, kind, change in changes(state):
        said = refusal(trainer, with_change(state, path, change))
        assert said is not None, f"{path}: {kind}"
        assert len(said.splitlines()) == 1 and len(said) < 400 and (kind == "missing" or str(path[0]) in said), said
        tried += 1
    after = trainer.state_dict()
    assert same(before | {"seconds": 0}, after | {"seconds": 0}) and tried > 500


def test_what_is_said(going):
    trainer, state = going
    said = {
        ("step",): (lambda step: "two", "step: expected a whole number of at least 0, got 'two'"),
        ("machine",): (lambda machine: KeyError, "machine is missing"),
        ("average", "updates"): (lambda updates: KeyError, "average.updates is missing"),
        ("evaluated_step",): (lambda step: 3, "the last evaluation: expected a whole number of at least 0, got -1"),
        ("optimizer", "state"): (lambda state: {}, "optimizer.state.0 is missing (and "),
        ("model", "classify.bias"): (
            lambda bias: bias * math.nan,
            "model.classify.bias: expected finite numbers, got 3 times NaN",
        ),
        ("average", "model", "classify.bias"): (
            lambda bias: bias[:2],
            "average.model.classify.bias: expected a tensor (3,) of float32, got a tensor (2,) of float32",
        ),
    }
    for path, (change, words) in said.items():
        if path == ("optimizer", "state") and state["scaler"]:
            continue  # fp16: every step so far may have overflowed
        assert words in refusal(trainer, with_change(state, path, change))


def test_states_changed_at_random_are_refused_when_read(going, tmp_path, rounds, seeded):
    trainer, state = going
    possible, path = list(changes(state)), tmp_path / "state.pt"
    for _ in range(rounds(25)):
        place, kind, change = seeded.choice(possible)
        torch.save(with_change(state, place, change), path)  # no digest: as old states have none
        written = path.read_bytes()
        try:
            trainer.load_state_dict(load_state(path))
        except UserError as error:
            assert len(str(error).splitlines()) == 1, error
        else:
            raise AssertionError(f"{place}, {kind}: taken")
        assert path.read_bytes() == written and [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_no_damage_to_a_file_goes_unseen(tmp_path, rounds, seeded):
    _, state = trained("sgd")
    path = tmp_path / "state.pt"
    save_state(path, state)
    whole = path.read_bytes()
    assert load_state(path)["step"] == 2
    assert torch.load(path, weights_only=True)["step"] == 2  # to others it is a file of torch.save
    unseen = []
    for _ in range(rounds(600)):
        seed = seeded.getrandbits(32)
        path.write_bytes(damaged(whole, seed))
        try:
            load_state(path)
            unseen.append(seed)
        except UserError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
    assert not unseen


def test_states_of_earlier_versions_have_no_digest_but_checksums(tmp_path):
    _, state = trained("sgd")
    path = tmp_path / "state.pt"
    torch.save(state, path)
    assert load_state(path)["step"] == 2
    data = path.read_bytes()
    weight = state["model"]["locate.weight"].numpy().tobytes()
    assert data.count(weight) == 1
    path.write_bytes(data.replace(weight, bytes(len(weight))))
    with pytest.raises(UserError, match="damaged .the checksum of its record .* is another one"):
        load_state(path)


def test_an_archive_that_would_grow_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "state.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("state/data.pkl", bytes(2**20))
    with pytest.raises(UserError, match="its records are larger than the file"):
        load_state(tmp_path / "state.pt")


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint():
    class Overflowing(TinyDetector):
        def forward(self, images, targets=None):
            losses = super().forward(images, targets)
            # A finite loss, the gradient of which is not: the square root's at 0.
            return losses | {"loss_root": (self.classify.bias * 0).sum().sqrt()}

    trainer = Trainer(Overflowing(3), dataclasses.replace(CONFIG, checkpoint_every=1), batches)
    trainer.hooks.on_save = lambda: pytest.fail("saved")
    with pytest.raises(NonFiniteLossError, match=r"not finite after step 1: NaN or infinity in 1 tensors \(classify.b"):
        trainer.fit()


# ---------------------------------------------------------------------- from the command line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        train.main([*TINY, "--train.steps", "3", "--out", str(folder)])
    return folder


def prepare(patch):
    patch.setitem(sys.modules, "doublehead.models", tiny_models())
    patch.setattr(pictures, "draw_curves", lambda *args: None)
    patch.setattr(charts, "draw_charts", lambda *args: [])


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def without_machine(folder):
    state = load_state(folder / "state.pt")
    del state["machine"]
    torch.save(state, folder / "state.pt")


def with_nan(folder):
    state = load_state(folder / "state.pt")
    state["model"]["classify.bias"] *= math.nan
    torch.save(state, folder / "state.pt")


DAMAGES = {
    "no machine": (without_machine, "state.pt: not a whole training state: machine is missing"),
    "NaN": (with_nan, "state.pt does not fit this recipe: model.classify.bias: expected finite numbers"),
    "cut short": (lambda folder: (folder / "state.pt").write_bytes(b"PK" * 9), "state.pt: not a training state, or"),
    "deep recipe": (lambda folder: (folder / "recipe.json").write_text("[" * 200_000), "recipe.json: not a recipe"),
    "binary recipe": (lambda folder: (folder / "recipe.json").write_bytes(b"\xff\xfe\0"), "recipe.json: not a recipe"),
    "list as recipe": (lambda folder: (folder / "recipe.json").write_text("[]"), "Recipe is [], a dictionary of"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_resume_from_what_is_damaged_changes_nothing(finished, tmp_path, monkeypatch, capsys, kind):
    prepare(monkeypatch)
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    damage, words = DAMAGES[kind]
    damage(folder)
    before = content(folder)
    with pytest.raises(SystemExit) as ended:
        train.main(["--resume", str(folder), "--train.steps", "6"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and error.startswith("error: ") and words in error
    assert content(folder) == before
