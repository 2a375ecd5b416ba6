"""Annotations as no tool should write them, by a seeded generator: each ends as data, or as one `DataError`."""

from __future__ import annotations

import json
import random
import warnings

import pytest

from doublehead.data import DataError, build_dataset
from doublehead.data.coco_json import id_of, shown
from tests.support.data_samples import CocoFolder, VocFolder

DEEP = [[[[[[[["deep"]]]]]]]]
for _ in range(900):  # below what the JSON reader refuses, above what repr() survives a few calls down
    DEEP = [DEEP]
VALUES = (
    None, True, False, 0, 1, -1, 2, 0.0, -0.0, 0.5, 1.0, 640.0, 10**12, 2**53 + 1, 2**63, -(2**63), 10**400,
    -(10**400), float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 5e-324, "", " ", "a.jpg", "dog", "10", "\n",
    "\x00", "\ud800", "../a.jpg", "/etc/passwd", "x" * 5000, [], [1], [1, 2, 3, 4], [0, 0, 0, 0], [1, 2, 10**400, 3],
    [1e308, 1e308, 1e308, 1e308], [None] * 4, ["1", "2", "3", "4"], [[1], 2, 3, 4], {}, {"id": 1}, {"a": [1]}, DEEP,
)  # fmt: skip


def mutated(content, rng: random.Random):
    """`content` with one to three values put in the place of others, keys lost, records repeated or replaced."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.randint(1, 3)):
        spot = content
        while True:
            keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(spot[key], (dict, list)) and rng.random() < 0.85:
                spot = spot[key]
                continue
            how = rng.random()
            if how < 0.8:
                spot[key] = rng.choice(VALUES)
            elif how < 0.9 or isinstance(spot, dict):
                del spot[key]
            else:
                spot.append(spot[key])
            break
    return content


def outcome(config, split="val", classes=None):
    """Data that can be used, or the error's message."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = build_dataset(config, split, classes=classes)
            for index in range(len(data)):
                _, target = data[index]
                assert target["boxes"].isfinite().all() and (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
            json.dumps(data.coco_ground_truth(), allow_nan=False)
            return data
        except DataError as error:
            message = str(error)
            assert message and "\n" not in message and len(message) < 2000, message
            return message


@pytest.mark.parametrize("seed", range(8))
def test_coco_json(tmp_path, seed):
    sample, rng = CocoFolder(tmp_path), random.Random(seed)
    good, kinds = sample.content, set()
    for number in range(40):
        sample.content = mutated(good, rng)
        config = sample.config(on_bad_record=("error", "skip")[number % 2])
        kinds.add(type(outcome(config, ("val", "train")[number // 2 % 2])))
    assert len(kinds) == 2  # the generator makes both: data, and errors


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "3",
        '"images"',
        "[]",
        "[[]]",
        "{}",
        "[" * 100_000,
        '{"images":' * 5000,
        "{'images': []}",
        "\ufeff",
        "NaN",
        '{"images": 1e400, "annotations": [], "categories": []}',
        '{"images": ' + "9" * 5000 + "}",
        "\x00\x01",
        "\u2028",
    ],
)
def test_files_that_are_not_coco(tmp_path, text):
    sample = CocoFolder(tmp_path)
    config = sample.config()
    sample.json_file("val").write_text(text, "utf-8")
    assert isinstance(outcome(config), str)


def test_bytes_that_are_no_text(tmp_path):
    sample, rng = CocoFolder(tmp_path), random.Random(5)
    config = sample.config()
    for length in (1, 2, 3, 4, 40, 400):
        sample.json_file("val").write_bytes(rng.randbytes(length))
        assert isinstance(outcome(config), str)


TEXTS = (
    "", " ", "0", "-1", "1e999", "-1e999", "nan", "inf", "١٢", "1_000", "0x10", "1,5", "9" * 400, "9" * 5000,
    "1e-400", "640.0", "five", "\u00a0", "<x/>", "&lt;", "&amp;", "&undefined;", "<![CDATA[5]]>", "<!-- 5 -->",
    "&#0;", "&#x110000;", "]]>", "<",
)  # fmt: skip
TAGS = (
    "annotation",
    "object",
    "name",
    "bndbox",
    "xmin",
    "size",
    "width",
    "difficult",
    "part",
    "html",
    "n:object",
    "é",
    "",
)


def mutated_xml(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 3)):
        how, place = rng.random(), rng.randrange(len(text))
        if how < 0.5:  # another text in an element
            starts = [i for i, letter in enumerate(text) if letter == ">"]
            start = rng.choice(starts) + 1
            text = text[:start] + rng.choice(TEXTS) + text[max(start, text.find("<", start)) :]
        elif how < 0.8:  # another name of an element, or of its beginning alone
            tag, other = rng.choice(TAGS[:-1]), rng.choice(TAGS)
            text = text.replace(f"<{tag}>", f"<{other}>", rng.choice([1, -1]))
            text = text.replace(f"</{tag}>", f"</{other}>", rng.choice([0, 1, -1, -1, -1]))
        elif how < 0.9:
            text = text[:place] + text[place + rng.randint(1, 20) :]
        else:
            text = text[:place] + rng.choice(TEXTS) + text[place:]
        text = text or "<"
    return text


@pytest.mark.parametrize("seed", range(8))
def test_voc_xml(tmp_path, seed):
    sample, rng = VocFolder(tmp_path), random.Random(seed)
    sample.write()
    good, kinds = sample.xml_file("one").read_text(), set()
    for number in range(40):
        sample.xml_file("one").write_text(mutated_xml(good, rng), "utf-8")
        config = sample.config(on_bad_record=("error", "skip")[number % 2])
        kinds.add(type(outcome(config, ("val", "train")[number // 2 % 2])))
    assert len(kinds) == 2


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xff\xfe<\x00a",
        b"<?xml",
        b"<a>" * 20_000,
        b"<?xml version='1.0' encoding=''?>",
        b'<?xml version="1.0" encoding="hex"?><annotation/>',
        b'<?xml version="1.0" encoding="rot13"?><annotation/>',
        b'<?xml version="1.0" encoding="utf-32"?><annotation/>',
    ],
)
def test_files_that_are_no_annotation(tmp_path, blob):
    sample = VocFolder(tmp_path)
    sample.write()
    sample.xml_file("one").write_bytes(blob)
    assert isinstance(outcome(sample.config()), str)


def test_hostile_lists_and_class_names(tmp_path):
    sample = VocFolder(tmp_path)
    sample.listed = ["one", "x" * 5000, "../JPEGImages/one", "/etc/passwd", "a\x00b", "two"]
    sample.write()
    assert "line 2" in outcome(sample.config())
    data = outcome(sample.config(on_bad_record="skip", max_skipped=1.0))
    assert data.file_names == ["one.jpg", "two.jpg"] and data.skipped.total() == 4


def test_values_are_shown_short_and_in_one_line():
    for value in VALUES:
        assert "\n" not in shown(value) and len(shown(value)) < 300
    with pytest.raises(DataError, match="^here: is 3, an object with an id is accepted$"):
        id_of(3, "here")
