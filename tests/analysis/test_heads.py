"""`analyze heads`: heads trained side by side equal those of a detector trained alone; resuming, records, mistakes."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from doublehead.analysis.heads import command, features
from doublehead.analysis.heads.learner import Learner
from doublehead.analysis.heads.reading import Reader as HeadsReader
from doublehead.analysis.heads.reading import readables
from doublehead.analysis.heads.record import _put_together
from doublehead.analysis.heads.setup import open_setup
from doublehead.analysis.readers import open_readers
from doublehead.data import build_dataset, build_loader, horizontal_flip
from doublehead.engine.checkpoint import load_model
from doublehead.engine.distributed import World
from doublehead.engine.errors import NonFiniteLossError
from doublehead.engine.evaluator import evaluate, evaluate_each
from doublehead.engine.optim import seed_step
from doublehead.engine.signals import Stopped
from doublehead.engine.trainer import Trainer
from doublehead.errors import UserError
from doublehead.models import build_detector
from doublehead.ops import box_iou
from tests.support.engine_standin import one_thread  # noqa: F401 (a fixture)
from tests.support.heads_samples import KINDS, OTHER_ROIS, STEPS, WIDE, options, save_start

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def out(start, tmp_path_factory):
    """All kinds, and two variants of the double head, trained in one go."""
    folder = tmp_path_factory.mktemp("heads") / "out"
    torch.set_num_threads(1)
    command.run(options(start, folder, vary=(WIDE, OTHER_ROIS)), World())
    return folder


def trained_alone(start, kind, monkeypatch, seed=3):
    """A detector of this kind, trained by the trainer on whole images, backbone and RPN frozen."""
    from doublehead.models import detector as module

    loaded = load_model(start)
    setup = open_setup(options(start, start / "unused", kinds=(kind,)), World())
    (member,) = setup.members
    model = build_detector(replace(member.model, backbone=replace(member.model.backbone, weights=None)), 7)
    for part in ("backbone", "rpn"):
        getattr(model.detector, part).load_state_dict(getattr(loaded.model.detector, part).state_dict())
        getattr(model.detector, part).requires_grad_(False)
    model.detector.backbone.eval()
    monkeypatch.setattr(model.detector.backbone, "train", lambda mode=True: model.detector.backbone)  # frozen: stays so
    for branch, spec in member.heads.items():
        learner = Learner(spec, 8, 7, seed, torch.device("cpu"))
        model.detector.heads[branch].load_state_dict(learner.head.state_dict())
    config = replace(setup.recipe.train, seed=seed)
    trainer = Trainer(
        model, config,
        lambda first: build_loader(setup.train_set, 1, train=True, seed=seed, start_step=first),
    )  # fmt: skip
    original = module.sample_rois

    def sample_rois(*arguments):  # the trainer's stream serves the RPN's anchors first
        seed_step(seed, trainer.step)
        return original(*arguments)

    monkeypatch.setattr(module, "sample_rois", sample_rois)
    trainer.fit()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_heads_equal_those_of_a_detector_trained_alone(start, out, kind, monkeypatch):
    """To the bit: the same initial heads, images, RoIs and optimiser."""
    alone = trained_alone(start, kind, monkeypatch).detector.heads.state_dict()
    together = load_model(out / "models" / f"{kind}-seed3").model.detector.heads.state_dict()
    assert alone.keys() == together.keys()
    for name, values in alone.items():
        assert torch.equal(values, together[name]), name


def test_training_changes_every_weight(start, out):
    """Else the test above would compare initial weights."""
    setup = open_setup(options(start, start / "unused"), World())
    for member in setup.members:
        heads = load_model(out / "models" / f"{member.kind}-seed3").model.detector.heads
        for branch, spec in member.heads.items():
            fresh = dict(Learner(spec, 8, 7, 3, torch.device("cpu")).head.named_parameters())
            for name, weight in heads[branch].named_parameters():
                moved = not torch.equal(weight, fresh[name])
                # A bias before a batch norm, or of theta and phi while W is 0, has no gradient.
                assert moved or name.endswith("bias") or ".theta" in name or ".phi" in name or ".g" in name, name


def test_records_hold_what_the_saved_detectors_find(out):
    found = json.loads((out / "heads.json").read_text())
    assert found["seeds"] == [3] and found["format"] == "doublehead heads 1"
    assert found["digest"] == torch.load(out / "seed-3.pt", weights_only=True)["digest"]
    (training,) = found["trainings"]
    assert training["seed"] == 3 and training["seconds"] > 0
    assert {"command", "version", "commit", "date", "machine"} <= training.keys() & found.keys()
    for kind in KINDS:
        model, saved, classes, _ = load_model(out / "models" / f"{kind}-seed3")
        assert (saved.train.seed, saved.train.steps, saved.train.batch_size) == (3, STEPS, 1)
        dataset = build_dataset(saved.data, "val", classes=classes)
        ours = [one for one in found["results"] if one["kind"] == kind and one["variant"] == "base"]
        (own,) = [one for one in ours if one["step"] == STEPS and one["readout"] == "fused"
                  and one["fusion"] == "complementary"]  # fmt: skip
        metrics, _ = evaluate(model, dataset)
        for name in ("AP", "AP50", "AP75", "APs", "APm"):
            assert own[name] == metrics[name], (kind, name)
        if kind == "double_head_ext":
            chosen = {name: model.detector.resolve_readout(name) for name in ("split", "fc", "conv")}
            for name, numbers in evaluate_each(model, dataset, chosen).items():
                (one,) = [o for o in ours if o["step"] == STEPS and o["readout"] == name]
                assert one["AP"] == numbers["AP"]


def test_the_learning_curves_are_drawn(out):
    with Image.open(out / "learning-curves.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(10**6)) > 20


def test_what_is_put_together_detects_as_the_whole_detector_does(start):
    """Every kind and read-out, with heads that say something of every box; after so few steps all AP are 0."""
    setup = open_setup(options(start, start / "features-of-all"), World())
    folder = start / "features-of-all" / "val"
    features.build(folder, setup.model, setup.val_set, False, False, 0)
    file = features.FeatureFile(
        folder, features.fingerprint(setup.model, setup.val_set, False, False), torch.device("cpu")
    )
    reader = HeadsReader(
        file, setup.val_set, setup.model.transform, setup.model.detector.roi_pooling.strides,
        setup.model.detector.min_side, 0,
    )  # fmt: skip
    heads = {}
    for number, spec in enumerate(setup.specs):
        heads[spec] = Learner(spec, 8, 7, number, torch.device("cpu")).head.eval()
        for name, weight in heads[spec].named_parameters():
            if name in ("classifier.weight", "regressor.weight", "classifier.bias"):
                torch.nn.init.normal_(weight, std=0.3)
    image = file[1, False]
    found = []
    with torch.no_grad():
        outputs = reader._run(heads, image, image.proposals.boxes)
        for readable in readables(setup.members, every=True):
            model = _put_together(setup, readable.member, heads).eval()
            model.detector.readout = readable.readout
            (wanted,) = model([setup.val_set[1][0]])
            ours = reader._detect(readable, outputs, image)
            assert len(wanted["scores"]) > 5
            for name, values in wanted.items():
                torch.testing.assert_close(ours[name], values, rtol=1e-4, atol=1e-3, msg=str(readable.readout))
            found.append(tuple(wanted["scores"].tolist()))
    assert len(set(found)) > 9  # kinds and read-outs differ


def test_every_head_is_recorded_once(out):
    found = json.loads((out / "heads.json").read_text())
    last = [one for one in found["heads"] if one["step"] == STEPS]
    names = [(one["variant"], one["head"]) for one in last]
    assert len(set(names)) == len(names)
    base = {"fc: both", "conv: both", "fc: classes", "fc: boxes", "conv: classes", "conv: boxes",
            "double_head_ext fc", "double_head_ext conv"}  # fmt: skip
    assert {name for variant, name in names if variant == "base"} == base
    assert {name for variant, name in names if variant == WIDE} == {"conv: boxes"}  # the fc-head is the base's
    assert {name for variant, name in names if variant == OTHER_ROIS} == {"fc: both", "fc: classes", "conv: boxes"}
    for one in last:
        assert sum(one["windows"]) == 4 * found["data"]["val_objects"]
        assert ("loss_reg" in one) == any(value is not None for value in one["regressed_iou"])
        assert ("loss_cls" in one) == any(value is not None for value in one["score"])
        assert one["rois"] == STEPS * (8 if one["variant"] == OTHER_ROIS else 16)


def test_windows_are_read_as_by_the_other_analyses(start, out):
    """The means of the record against those of the saved detectors, read by `analyze sliding-windows`' own reader."""
    found = json.loads((out / "heads.json").read_text())
    setup = open_setup(options(start, out), World())
    drawn = HeadsReader(setup.features(train=False), setup.val_set, setup.model.transform, (4, 8, 16, 32), 0.0, 4)
    folder = out / "models"
    specs = [f"{head}={folder}/{kind}-seed3" for head, kind in (("fc: both", "fc"), ("conv: both", "conv"))]
    specs += [f"double_head_ext {name}={folder}/double_head_ext-seed3:{name}" for name in ("fc", "conv")]
    for reader in open_readers(specs, torch.device("cpu")):
        parts = []
        for index in range(len(setup.val_set)):
            image, target = setup.val_set[index]
            windows = drawn._windows(drawn.features[index, False])
            mine = reader.features(image, target["boxes"])
            assert set(map(tuple, windows.truth.tolist())) == set(map(tuple, target["boxes"].tolist()))
            reading = reader.read_all(mine, windows.boxes, windows.labels, 1000)
            own, moved = (
                box_iou(boxes[:, None], windows.truth[:, None]).flatten() for boxes in (windows.boxes, reading.boxes)
            )
            parts.append(torch.stack((own, moved, reading.scores)))
        own, moved, scores = torch.cat(parts, 1)
        bins = (own * 20).long().clamp(max=19)
        (one,) = [one for one in found["heads"] if one["step"] == STEPS and one["variant"] == "base"
                  and one["head"] == reader.name]  # fmt: skip
        assert sum(count > 0 for count in one["windows"]) > 8
        for b in range(20):
            chosen = bins == b
            assert one["windows"][b] == int(chosen.sum())
            if one["windows"][b]:
                assert one["regressed_iou"][b] == pytest.approx(float(moved[chosen].mean()), abs=1e-5)
                assert one["score"][b] == pytest.approx(float(scores[chosen].mean()), abs=1e-5)
            else:
                assert one["regressed_iou"][b] is None and one["score"][b] is None


def test_a_stopped_training_goes_on_to_the_same_bits(start, out, tmp_path, monkeypatch):
    from doublehead.analysis.heads import training

    original = training.SideBySide._train

    def stop_in_step_3(self, images):
        original(self, images)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    # Fewer kinds than in `out`, for time: the heads are the same whatever is trained beside them.
    kinds = ("double_head", "double_head_ext")
    changes = {"vary": (OTHER_ROIS,), "kinds": kinds, "varied_kinds": ("fc", "double_head"), "save_models": kinds}
    given = options(start, tmp_path / "out", **changes)
    monkeypatch.setattr(training.SideBySide, "_train", stop_in_step_3)
    with pytest.raises(Stopped):
        command.run(given, World())
    monkeypatch.setattr(training.SideBySide, "_train", original)
    command.run(given, World())
    for kind in kinds:
        whole, resumed = (load_model(folder / "models" / f"{kind}-seed3").model for folder in (out, tmp_path / "out"))
        for name, values in whole.state_dict().items():
            assert torch.equal(values, resumed.state_dict()[name]), (kind, name)
    before, after = (json.loads((folder / "heads.json").read_text()) for folder in (out, tmp_path / "out"))
    assert len(after["results"]) > 10 and all(one in before["results"] for one in after["results"])
    assert len(after["heads"]) > 10 and all(one in before["heads"] for one in after["heads"])


def test_parts_of_a_step_have_their_own_statistics_and_share_a_gradient(start):
    """`train.accumulate`: two parts of one image each, against both passes and their mean gradient by hand."""
    from doublehead.analysis.heads.learner import Part

    setup = open_setup(
        options(start, start / "unused", kinds=("conv",), images=2, set=("train.accumulate=2",)), World()
    )
    (spec,) = setup.specs
    torch.manual_seed(0)
    parts = [
        Part(
            torch.randn(6, 8, 7, 7),
            torch.tensor([1, 0, 2, 0, 3, 0]),
            torch.ones(6, dtype=torch.bool),
            torch.randn(6, 4),
        )
        for _ in range(2)
    ]
    learner, byhand = (Learner(spec, 8, 7, 0, torch.device("cpu")) for _ in range(2))
    learner.step(0, parts)
    byhand.head.train()
    sums = {}
    for part in parts:
        byhand.head.zero_grad()
        sum(byhand._losses(part).values()).backward()
        for name, weight in byhand.head.named_parameters():
            sums[name] = sums.get(name, 0) + weight.grad / 2
    for name, weight in learner.head.named_parameters():
        torch.testing.assert_close(weight.grad, sums[name], rtol=1e-4, atol=1e-6)
    for name, values in byhand.head.named_buffers():
        torch.testing.assert_close(values, dict(learner.head.named_buffers())[name])


def test_features_are_those_of_the_detector(start, tmp_path):
    setup = open_setup(options(start, tmp_path / "out"), World())
    features.build(tmp_path / "f", setup.model, setup.train_set, True, True, 0)
    file = features.FeatureFile(
        tmp_path / "f", features.fingerprint(setup.model, setup.train_set, True, True), torch.device("cpu")
    )
    for index in (0, 5):
        image, target = setup.train_set[index]
        for mirrored in (False, True):
            seen = (image, target)
            if mirrored:
                seen = horizontal_flip(image, target)
            wanted = features.compute_features(setup.model, *seen, True)
            found = file[index, mirrored]
            for level, other in zip(found.maps, wanted.maps, strict=True):
                assert torch.equal(level, other)
                assert level.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(found.proposals.boxes, wanted.proposals.boxes)
            assert torch.equal(found.proposals.valid, wanted.proposals.valid)
            assert torch.equal(found.targets.boxes, wanted.targets.boxes)
            assert torch.equal(found.targets.labels, wanted.targets.labels)
            assert (found.size, found.stored, found.image_id) == (wanted.size, wanted.stored, wanted.image_id)
    with pytest.raises(UserError, match="another detector or of other data"):
        features.build(tmp_path / "f", setup.model, setup.train_set, False, True, 0)


def test_processes_divide_the_seeds_and_wait_long_for_each_other(start, tmp_path, monkeypatch):
    """Features and another process's trainings take longer than processes wait for each other elsewhere."""
    waits, trained = [], []

    class Second(World):
        def on_main(self, work, long=False):
            waits.append(("main", long))
            return Path(tmp_path) if work.__name__ == "make" else None

        def barrier(self, long=False):
            waits.append(("all", long))

    monkeypatch.setattr(command, "train_seed", lambda setup, seed, shown: trained.append((seed, shown)))
    command.run(options(start, tmp_path, seeds=(3, 4, 5, 6, 7)), Second(1, 2))
    assert trained == [(4, False), (6, False)]
    assert waits == [("main", False), ("main", True), ("main", True), ("all", True), ("main", False)]


def test_changed_options_are_refused(start, out):
    with pytest.raises(UserError, match="other heads, data or options"):
        command.run(options(start, out, vary=(WIDE,)), World())


def test_other_kinds_of_the_same_heads_are_refused(start, out):
    """Double-Head needs no head that the others have not; its results must not be missing without a word."""
    kinds = tuple(kind for kind in KINDS if kind != "double_head")
    with pytest.raises(UserError, match="other kinds or variants"):
        command.run(options(start, out, kinds=kinds, vary=(WIDE, OTHER_ROIS)), World())


def test_detectors_that_are_missing_are_written_again(start, out, tmp_path):
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "models" / "double_head_ext-seed3")
    command.run(options(start, tmp_path / "out", vary=(WIDE, OTHER_ROIS)), World())
    ours, theirs = (folder / "models" / "double_head_ext-seed3" for folder in (out, tmp_path / "out"))
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    assert json.loads((ours / "metrics.json").read_text()) == json.loads((theirs / "metrics.json").read_text())
    again = load_model(theirs).model.state_dict()
    for name, values in load_model(ours).model.state_dict().items():
        assert torch.equal(values, again[name]), name


def test_what_is_not_finite_is_not_saved(start, tmp_path):
    given = options(start, tmp_path / "out", kinds=("fc",), set=("train.lr=1e18",), evaluate_at=(4,), save_every=1)
    with pytest.raises(NonFiniteLossError, match="fc: both: .* is not finite with sgd at a learning rate of 1e[+]18"):
        command.run(given, World())
    state = torch.load(tmp_path / "out" / "seed-3.pt", weights_only=True)["training"]
    assert state["step"] < STEPS
    for learner in state["learners"]:
        assert all(values.isfinite().all() for values in learner["head"].values())
