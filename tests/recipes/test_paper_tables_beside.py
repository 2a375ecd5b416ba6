"""What stands beside our rows in the paper's tables: parameters counted from the models, other methods' numbers."""

import csv
import dataclasses
import io

import pytest

from doublehead.analysis.parameters import M, conv_head_weights, tower_weights
from doublehead.cli import tables
from doublehead.config import HeadConfig, NonLocalConfig
from doublehead.models import build_detector
from doublehead.paper import TABLES
from doublehead.recipes import RECIPES


def printed(capsys, *arguments) -> str:
    tables.main(list(arguments))
    return capsys.readouterr().out


def rows(capsys, *arguments) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(printed(capsys, *arguments, "--format", "csv"))))


def test_weights_are_the_papers_to_the_digit():
    model = RECIPES["double-head-r50-fpn"].model
    assert tower_weights(model) == {"fc": 13_893_632, "conv": 3 * 1_114_112 + 2 * 2_097_152}
    assert tower_weights(model)["fc"] == 13.25 * M
    for blocks, non_local, expected in ((1, False, 1.0625), (4, False, 4.25), (3, True, 4.125), (7, True, 10.25)):
        head = HeadConfig("double_conv", conv_blocks=blocks, non_local=NonLocalConfig(enabled=non_local))
        assert conv_head_weights(dataclasses.replace(model, head=head)) == expected * M
    assert conv_head_weights(RECIPES["faster-rcnn-r50-fpn"].model) is None


def test_weights_are_those_of_the_model_that_is_built():
    config = RECIPES["miniature-double-head"].model
    model = build_detector(dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, weights=None)), 7)
    parameters = model.detector.heads["conv"].tower.named_parameters()
    assert conv_head_weights(config) == sum(p.numel() for name, p in parameters if p.dim() == 4)


def test_table_2_has_the_conv_heads_parameters(capsys):
    for row in rows(capsys, "2"):
        paper, counted = row["conv-head M paper"], row["conv-head M counted"]
        if row["row"] == "K = 0 (FPN)":
            assert paper == counted == ""
        else:
            assert float(counted) == pytest.approx(float(paper), abs=0.0051), row["row"]  # the paper rounds
    text = printed(capsys, "2")
    assert "7.19 M   7.1875 M" in text and "M is 2^20" in text
    assert all("conv-head M paper" not in row for row in rows(capsys, "1"))


def test_other_methods_stand_beside_ours_as_published_numbers(capsys):
    lines = rows(capsys, "5")
    assert [row["row"].split(" [")[0] for row in lines[:-1]] == [
        "FPN", "Mask R-CNN", "Deep Regionlets", "IoU-Net", "Soft-NMS", "LTR", "Fitness NMS",
    ]  # fmt: skip
    assert [row["AP paper"] for row in lines] == ["36.2", "38.2", "39.3", "40.6", "40.9", "41.0", "41.8", "42.3"]
    assert all(row["recipe"] == row["AP mean"] == "" and row["runs"] == "0" for row in lines[:-1])
    assert lines[3]["AP75 paper"] == "" and lines[-1]["recipe"] == "double-head-ext-r101-fpn"
    text = printed(capsys, "5", "--format", "markdown")
    assert "| IoU-Net [20], ResNet-101 | (published) |  | 40.6 |" in text and "| - |" in text
    assert "numbers that others published" in text
    assert all(len(one.published) == len(TABLES[5].columns) for one in TABLES[5].others)


def test_table_6_says_how_difficult_objects_count(capsys):
    assert "Difficult objects are COCO's crowds here" in printed(capsys, "6")
