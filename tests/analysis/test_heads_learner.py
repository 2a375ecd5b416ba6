"""`analyze heads`: a step against the optimiser by hand, averaged weights, loss weights, and what digests say."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, smooth_l1_loss

from doublehead.analysis.heads import features
from doublehead.analysis.heads.learner import Learner, Part
from doublehead.analysis.heads.setup import open_setup
from doublehead.analysis.heads.specs import KINDS, plan
from doublehead.analysis.options import EvaluationData, Heads
from doublehead.config import DataConfig, LossConfig, TrainConfig
from doublehead.data import build_dataset
from doublehead.data.shapes import CLASSES
from doublehead.engine.checkpoint import save_model
from doublehead.engine.distributed import World
from doublehead.errors import UserError
from doublehead.models import build_detector
from tests.support.analysis_detector import recipe
from tests.support.engine_standin import one_thread  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("one_thread")
LOSS = LossConfig(w_fc=2.0, w_conv=2.5, l_fc=0.7, l_conv=0.8)


def learner(kind="double_head_ext", branch="conv", **train):
    config = TrainConfig(**({"steps": 8, "lr": 0.05, "milestones": (), "warmup_steps": 0} | train))
    base = replace(recipe("double_head_ext", LOSS), train=config)
    (member,) = plan(base, (kind,), {}, ())
    return Learner(member.heads[branch], 8, 7, 0, torch.device("cpu"))


def part(seed):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.tensor([1, 0, 2, 0, 3, 5])
    valid = torch.tensor([True, True, True, True, True, False])
    return Part(torch.randn(6, 8, 7, 7, generator=draw), labels, valid, torch.randn(6, 4, generator=draw))


def test_a_step_is_the_optimisers_on_the_clipped_gradient_of_the_weighted_losses():
    """Of an Ext's conv-head, with the loss written out (Equations 2 and 3); the bias learns twice as fast."""
    ours = learner(clip_grad_norm=0.01, momentum=0.9, weight_decay=0.1, bias_lr_factor=2.0)
    head = copy.deepcopy(ours.head).train()
    state = {name: torch.zeros_like(weight) for name, weight in head.named_parameters()}
    for step in range(3):
        given = part(step)
        output = head(given.pooled)
        positive = torch.tensor([0, 2, 4])  # the last is not valid
        boxes = smooth_l1_loss(
            output.deltas[positive, given.labels[positive]], given.wanted[positive],
            beta=ours.spec.beta, reduction="sum",
        )  # fmt: skip
        loss = 2.5 * (0.2 * cross_entropy(output.logits[:5], given.labels[:5]) + 0.8 * boxes / 5)
        head.zero_grad()
        loss.backward()
        norm = sum(weight.grad.square().sum() for weight in head.parameters() if weight.grad is not None).sqrt()
        assert norm > 0.01
        with torch.no_grad():
            for name, weight in head.named_parameters():
                bias = name.endswith("bias")
                gradient = weight.grad * 0.01 / norm + (0 if bias else 0.1) * weight
                state[name] = 0.9 * state[name] + gradient
                weight -= 0.05 * (2 if bias else 1) * state[name]
        ours.step(step, [given])
    for name, weight in ours.head.named_parameters():
        torch.testing.assert_close(weight, dict(head.named_parameters())[name], rtol=1e-4, atol=1e-6, msg=name)


def test_averaged_weights_are_evaluated_with_the_heads_own_statistics():
    ours = learner(ema_decay=0.15)
    assert learner().evaluated is not None and ours.evaluated is not ours.head
    wanted = {name: weight.detach().clone() for name, weight in ours.head.named_parameters()}
    for step, decay in enumerate((0.15, 0.15, 0.15)):  # (1 + n) / (10 + n) is larger from the first step on
        ours.step(step, [part(step)])
        for name, weight in ours.head.named_parameters():
            wanted[name] = decay * wanted[name] + (1 - decay) * weight.detach()
    for name, weight in ours.evaluated.named_parameters():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-5, atol=1e-7)
    own = dict(ours.head.named_buffers())
    for name, values in ours.evaluated.named_buffers():
        assert torch.equal(values, own[name])
    plain = learner()
    assert plain.evaluated is plain.head


def test_a_learner_goes_on_with_its_averaged_weights():
    whole, stopped, resumed = (learner(ema_decay=0.15, optimizer="adamw") for _ in range(3))
    for step in range(3):
        whole.step(step, [part(step)])
        if step < 2:
            stopped.step(step, [part(step)])
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    resumed.step(2, [part(2)])
    for ours, theirs in ((whole.head, resumed.head), (whole.evaluated, resumed.evaluated)):
        for name, values in ours.state_dict().items():
            assert torch.equal(values, theirs.state_dict()[name]), name
    assert whole.take_losses() == resumed.take_losses()


def test_losses_weigh_as_in_the_paper():
    """Table 1: heads of both tasks 1; Equation 1: a head's tower's weight; Equations 2, 3: an Ext's shares of it."""
    base = recipe("double_head_ext", LOSS)
    found = {
        member.kind: {name: spec.weights for name, spec in member.heads.items()}
        for member in plan(base, KINDS, {}, ())
    }  # fmt: skip
    ext = found.pop("double_head_ext")
    assert ext["fc"] == pytest.approx((2.0 * 0.7, 2.0 * 0.3)) and ext["conv"] == pytest.approx((2.5 * 0.2, 2.5 * 0.8))
    assert found == {
        "fc": {"fc": (1.0, 1.0)}, "conv": {"conv": (1.0, 1.0)},
        "double_fc": {"fc_1": (2.0, 0.0), "fc_2": (0.0, 2.0)},
        "double_conv": {"conv_1": (2.5, 0.0), "conv_2": (0.0, 2.5)},
        "double_head_reverse": {"conv": (2.5, 0.0), "fc": (0.0, 2.0)},
        "double_head": {"fc": (2.0, 0.0), "conv": (0.0, 2.5)},
    }  # fmt: skip


def test_towers_start_alike_whatever_their_tasks():
    both, boxes = learner("fc", "fc"), learner("double_head_reverse", "fc")
    for name, weight in both.head.tower.state_dict().items():
        assert torch.equal(weight, boxes.head.tower.state_dict()[name])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    base = recipe("double_head_ext")
    train = TrainConfig(steps=40, batch_size=2, milestones=(20, 30), warmup_steps=10, device="cpu")
    data = DataConfig("shapes", train_images=3, val_images=2, image_size=64, workers=0)
    folder = tmp_path_factory.mktemp("start")
    model = build_detector(base.model, 7)
    save_model(folder / "model.safetensors", model, replace(base, train=train, data=data), CLASSES, range(1, 7))
    return folder


def setup(start, tmp_path, **changes):
    given = {"steps": 8, "images": 2, "kinds": ("fc",)} | changes
    return open_setup(Heads(str(tmp_path / "out"), "cpu", str(start), EvaluationData(), **given), World())


def test_the_schedule_keeps_its_shape(start, tmp_path):
    (spec,) = setup(start, tmp_path).specs
    assert (spec.train.steps, spec.train.milestones, spec.train.warmup_steps) == (8, (4, 6), 2)


def test_a_state_is_of_all_that_decides_its_numbers(start, tmp_path):
    same = [setup(start, tmp_path).digest, setup(start, tmp_path, seeds=(7,), save_every=3).digest]
    assert same[0] == same[1]
    others = [
        {"images": 1}, {"evaluate_at": (3,)}, {"windows": 2}, {"train_images": 2}, {"set": ("train.ema_decay=0.9",)},
    ]  # fmt: skip
    digests = [setup(start, tmp_path, **changes).digest for changes in others]
    assert len({same[0], *digests}) == 1 + len(others)


def test_features_are_of_all_that_decides_them(start, tmp_path):
    of = setup(start, tmp_path)
    model, data = of.model, of.recipe.data
    sets = [of.train_set, build_dataset(replace(data, train_images=2), "train"), of.val_set]
    found = [features.fingerprint(model, dataset, True, True) for dataset in sets]
    found += [features.fingerprint(model, sets[0], *how) for how in ((True, False), (False, True))]
    for part_of_it in ("backbone", "rpn"):
        with torch.no_grad():
            next(getattr(model.detector, part_of_it).parameters()).add_(1)
        found.append(features.fingerprint(model, sets[0], True, True))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: (folder / "features.bin").write_bytes(b"1234"), "another size than features.json says"),
        (lambda folder: (folder / "features.bin").unlink(), "is missing"),
        (lambda folder: (folder / "features.json").write_text('{"form'), "cannot be read"),
        (lambda folder: (folder / "features.json").write_text('{"format": "other", "items": []}'), "cannot be read"),
    ],
)
def test_damaged_features_are_named(start, tmp_path, change, message):
    of = setup(start, tmp_path)
    folder = tmp_path / "features"
    features.build(folder, of.model, of.val_set, False, False, 0)
    change(folder)
    with pytest.raises(UserError, match=message):
        features.build(folder, of.model, of.val_set, False, False, 0)


def test_slots_without_a_proposal_are_not_read(start, tmp_path):
    of, folder = setup(start, tmp_path), tmp_path / "features"
    features.build(folder, of.model, of.val_set, False, False, 0)
    index = json.loads((folder / "features.json").read_text())
    index["items"][0]["proposals"] = 3
    (folder / "features.json").write_text(json.dumps(index))
    image = features.FeatureFile(folder, index["fingerprint"], torch.device("cpu"))[0, False]
    assert image.proposals.valid[0].nonzero().flatten().tolist() == [0, 1, 2]
    assert image.proposals.boxes.shape[1] == index["items"][0]["slots"] > 3
