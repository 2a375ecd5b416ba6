"""`analyze heads`: which heads kinds and variants need, and mistakes."""

from dataclasses import replace

import pytest

from doublehead.analysis.heads.reading import readables
from doublehead.analysis.heads.specs import distinct_heads, parse_variant, plan, varied
from doublehead.engine.checkpoint import load_model
from doublehead.errors import UserError
from tests.support.analysis_detector import analyze
from tests.support.heads_samples import KINDS, save_start


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_start(tmp_path_factory.mktemp("start"))


def test_only_an_ext_has_the_read_out_of_an_ext(start):
    base = load_model(start).recipe
    base = replace(base, model=replace(base.model, detection=replace(base.model.detection, readout="split")))
    found = {one.member.kind: one.readout.detection.readout for one in readables(plan(base, KINDS, {}, ()), False)}
    assert found == {kind: "split" if kind == "double_head_ext" else "fused" for kind in KINDS}
    assert {one.model.detection.readout for one in plan(base, ("fc",), {}, ())} == {"fused"}  # so that it can be loaded


def test_variants_share_what_they_do_not_change(start):
    base = load_model(start).recipe
    members = plan(base, KINDS, {"text": parse_variant("model.roi.conv_box_scale=1.0")}, ("fc", "double_head"))
    assert [m.kind for m in members if m.variant == "text"] == ["double_head"]  # fc would be the base's
    assert len(distinct_heads(members)) == 8 + 1


def test_a_grid_of_balance_weights_needs_a_head_for_each_weight(start):
    base = load_model(start).recipe  # l_fc 0.7, l_conv 0.8
    grid = {f"{a}/{b}": {"model.loss.l_fc": a, "model.loss.l_conv": b} for a in (0.5, 0.7, 0.9) for b in (0.6, 0.8)}
    members = plan(base, ("double_head_ext",), grid, ("double_head_ext",))
    assert len(members) == 1 + 6  # with the base's own cell
    assert len(distinct_heads(members)) == 3 + 2


def test_an_ext_is_read_out_by_what_its_weights_train(start):
    base = load_model(start).recipe

    def ways(every, **weights):
        changes = {f"model.loss.{name}": value for name, value in weights.items()}
        members = plan(base, (), {"v": changes}, ("double_head_ext",))
        return [(one.readout.detection.readout, one.readout.detection.fusion) for one in readables(members, every)]

    fused = [("fused", fusion) for fusion in ("complementary", "max", "average", "none")]
    assert set(ways(True)) == {*fused, ("split", "complementary"), ("fc", "complementary"), ("conv", "complementary")}
    assert ways(False) == [fused[0]]
    # Without the conv-head's classifier only the fc-head's classes are left; without the fc-head's, those of conv.
    assert ways(False, l_conv=1.0) == [("split", "complementary")]
    assert ways(False, l_fc=0.0) == [("conv", "complementary")]
    assert ways(True, l_fc=0.0, l_conv=1.0) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("model.backbone.name=resnet50", "cannot be varied"),
        ("train.steps=3", "cannot be varied"),
        ("train.augment.crop=0.5", "cannot be varied"),
        ("model.roi.sample=3", "did you mean model.roi.samples"),
        ("model.head.conv_blocks=zero", "conv_blocks"),
        ("model.head.conv_blocks", "expected FIELD=VALUE"),
    ],
)
def test_a_wrong_variant_is_named(start, text, message):
    with pytest.raises(UserError, match=message):
        varied(load_model(start).recipe, parse_variant(text), "--vary")


def test_values_of_variants():
    assert parse_variant("train.milestones=[1,2],train.optimizer=sgd,train.clip_grad_norm=null") == {
        "train.milestones": [1, 2], "train.optimizer": "sgd", "train.clip_grad_norm": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "more, message",
    [
        (["--seeds", "1", "1"], "--seeds: 1 is named twice"),
        (["--kinds", "conv5"], "--kinds: conv5 is the head of a backbone without a pyramid"),
        (["--train-images", "0"], "--train-images is 0"),
        (["--steps", "0"], "--steps is 0"),
        (["--evaluate-at", "99"], "there is no such step"),
        (["--images", "3", "--set", "train.accumulate=2"], "cannot be divided"),
        (
            ["--varied-kinds", "double_head_ext", "--vary", "model.loss.l_fc=0,model.loss.l_conv=1"],
            "no head learns what every read-out needs",
        ),
        (["--vary", "model.head.conv_blocks=2"], "expected an odd number"),
    ],
)
def test_mistakes_on_the_command_line(start, tmp_path, capsys, more, message):
    assert analyze("heads", start, "--steps", 4, "--out", tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
