"""States of a measurement: what is read back is believed only if it is whole; one command a folder; Ctrl-C keeps."""

import json
import os
import signal

import pytest
import torch

from doublehead.analysis import states
from doublehead.analysis.feature_correlation import CosineTable, cosine_sum
from doublehead.analysis.moments import MomentTable
from doublehead.analysis.qualitative_cases import KINDS, Case, Cases, Verdict
from doublehead.analysis.shards import measure_images
from doublehead.analysis.states import FORMAT, State, merge_states
from doublehead.engine.distributed import World
from doublehead.engine.errors import UserError
from doublehead.engine.lock import FolderLock
from doublehead.engine.signals import Stopped
from tests.support.engine_standin import MemoryDataset, one_thread  # noqa: F401 (a fixture)

IDS = [7, 17, 27, 37]
FINGERPRINT = {"heads": [["a", "0123", ["fc"], "fc"]], "seed": 0}


def moments() -> MomentTable:
    table = MomentTable((2, 3))
    cells = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 0])
    table.add(cells, torch.tensor([0.1, 0.5, 1]), torch.tensor([0.9, 0, 1]))
    return table


def cosines() -> CosineTable:
    return CosineTable({("a, fc", "input"): cosine_sum(torch.randn(3, 5, 2, 2))})


def cases() -> Cases:
    verdicts = {"conv": Verdict("missed", None), "fc": Verdict("found", 0.9), "Ext": Verdict("found", 0.8)}
    return Cases([Case(KINDS[0], 1, 0, 2, (1.0, 2.0, 3.0, 4.0), verdicts, {"conv": 0.1, "fc": 0.9})])


MAKE = {"moments": moments, "cosines": cosines, "cases": cases}


def merged(folder, table) -> State:
    return merge_states(folder, State(FINGERPRINT, table.empty()), IDS)


def refusal(folder, table) -> str:
    before = sorted(path.read_bytes() for path in folder.iterdir())
    with pytest.raises(UserError) as error:
        merged(folder, table)
    assert sorted(path.read_bytes() for path in folder.iterdir()) == before  # nothing is removed
    text = str(error.value)
    assert len(text.splitlines()) == 1 and len(text) < 600 and "give another --out" in text
    return text


def change(path, values: dict, digest: bool = True) -> None:
    """Put other values into a state's file, with the digest that belongs to them."""
    content = json.loads(path.read_text()) | values
    if digest:
        content["digest"] = states.content_digest(
            {name: content.get(name) for name in ("fingerprint", "done", "table")}
        )
    path.write_text(json.dumps(content))


@pytest.fixture(params=list(MAKE))
def table(request):
    return MAKE[request.param]()


@pytest.fixture
def file(tmp_path, table):
    State(FINGERPRINT, table, {7, 27}).write(tmp_path / "merged.json")
    return tmp_path / "merged.json"


def test_a_state_comes_back_as_it_was(file, table):
    state = merged(file.parent, table)
    assert json.dumps(state.table.to_dict()) == json.dumps(table.to_dict()) and state.done == {7, 27}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "it is not JSON"),
        ("[1, 2]", "it is not a JSON object"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("\x80\x04K\x01.", "it is not JSON"),
        ("{}", "written by another version"),
        (json.dumps({"fingerprint": FINGERPRINT, "done": [7], "table": {}}), f"this one reads '{FORMAT}'"),
        (json.dumps({"format": FORMAT, "done": [7], "table": {}}), "it lacks one of fingerprint, done, table"),
    ],
)
def test_what_is_no_state_is_refused(tmp_path, text, message):
    (tmp_path / "rank-3.json").write_text(text)
    assert message in refusal(tmp_path, moments())


def test_a_changed_digit_is_noticed(file, table):
    change(file, {"done": [7, 37]}, digest=False)
    assert "does not match its digest" in refusal(file.parent, table)


def test_a_file_too_large_is_not_read(file, table, monkeypatch):
    monkeypatch.setattr(states, "MOST_BYTES", 100)
    assert "at most 100 are accepted" in refusal(file.parent, table)


@pytest.mark.parametrize("done", [[7, 7], [7, 99], ["7"], [True], [[7]], {"7": 1}, None, 7])
def test_images_that_cannot_be_are_refused(file, table, done):
    change(file, {"done": done})
    assert "merged.json: damaged: it" in refusal(file.parent, table)


def test_tables_of_another_figure_or_of_nothing_are_refused(file, table):
    for other in (*(make().to_dict() for make in MAKE.values()), {}, [], None, "text", 3, {"sums": 1}, {"cases": [{}]}):
        other = json.loads(json.dumps(other))
        if other == json.loads(json.dumps(table.to_dict())):
            continue
        if isinstance(table, CosineTable) and isinstance(other, dict) and isinstance(other.get("sums"), list):
            continue  # other random maps: a sound table
        change(file, {"table": other})
        assert "merged.json: damaged: its table" in refusal(file.parent, table), other


MOMENTS = {"shape": [2, 3], "cells": [[[0, 2], [1, 5, 5, 25, 25, 25]]]}
WRONG_MOMENTS = [
    MOMENTS | {"shape": [2, 4]},  # of another measurement
    MOMENTS | {"cells": [[[0, 3], [1, 5, 5, 25, 25, 25]]]},  # beyond the shape
    MOMENTS | {"cells": [[[0, -1], [1, 5, 5, 25, 25, 25]]]},
    MOMENTS | {"cells": [[[0], [1, 5, 5, 25, 25, 25]]]},
    MOMENTS | {"cells": 2 * [[[0, 2], [1, 5, 5, 25, 25, 25]]]},  # twice
    MOMENTS | {"cells": [[[0, 2], [1, 5, 5, 25, 25]]]},
    MOMENTS | {"cells": [[[0, 2], [1, 5, 5, 25, 25, 25, 1]]]},
    MOMENTS | {"cells": [[[0, 2], [1, 5.0, 5, 25, 25, 25]]]},
    MOMENTS | {"cells": [[[0, 2], [1, float("nan"), 5, 25, 25, 25]]]},
    MOMENTS | {"cells": [[[0, 2], [0, 0, 0, 0, 0, 0]]]},  # no pairs
    MOMENTS | {"cells": [[[0, 2], [1, 2**25, 5, 2**50, 25, 25]]]},  # a score of 2
    MOMENTS | {"cells": [[[0, 2], [2, 10, 5, 3, 25, 25]]]},  # a negative variance: its root would be a traceback
]


@pytest.mark.parametrize("values", WRONG_MOMENTS)
def test_moments_that_no_pairs_have_are_refused(tmp_path, values):
    path = tmp_path / "rank-0.json"
    State(FINGERPRINT, moments(), {7}).write(path)
    change(path, {"table": MOMENTS})
    merged(tmp_path, moments())
    State(FINGERPRINT, moments(), {17}).write(path)
    change(path, {"table": values})
    assert "rank-0.json: damaged: " in refusal(tmp_path, moments())


def test_cosines_that_no_objects_have_are_refused(tmp_path):
    table = cosines()
    (entry,) = table.to_dict()["sums"]
    head, which, total, count, objects, zeros = json.loads(json.dumps(entry))
    wrong = [
        [[head, "inward", total, count, objects, zeros]], [[head, which, total, count, 2, zeros]], 2 * [entry],
        [[head, which, [row[:2] for row in total], count, objects, zeros]], [[head, which, total, total, 3, zeros]],
        [[head, which, [[2**63] * 4] * 4, count, objects, zeros]], [[head, which, total, count, objects]],
        [[head, which, [[0.5] * 4] * 4, count, objects, zeros]], [[3, which, total, count, objects, zeros]],
        [[head, which, [*total[:3], total[3][:2]], count, objects, zeros]], [[head, which, total, count, objects, -1]],
    ]  # fmt: skip
    path = tmp_path / "rank-0.json"
    for sums in wrong:
        State(FINGERPRINT, table, {17}).write(path)
        change(path, {"table": {"sums": sums}})
        assert "rank-0.json: damaged: its table" in refusal(tmp_path, table), sums


def test_cases_that_cannot_be_are_refused(tmp_path):
    (whole,) = json.loads(json.dumps(cases().to_dict()))["cases"]
    wrong = [
        {"kind": "no-kind"}, {"image": -1}, {"image": "0"}, {"object": 1.5}, {"label": 0}, {"box": [0, 0, 1]},
        {"box": [0, 0, 1, float("inf")]}, {"verdicts": {"fc": ["found", 0.9, None]}}, {"at_box": {"fc": 0.5}},
        {"more": 1},
        {"verdicts": whole["verdicts"] | {"fc": ["guessed", 0.9, None]}},
        {"verdicts": whole["verdicts"] | {"fc": ["found", "0.9", None]}},
        {"verdicts": whole["verdicts"] | {"fc": ["found", None, None]}},
    ]  # fmt: skip
    path = tmp_path / "rank-0.json"
    for change_of_case in wrong:
        State(FINGERPRINT, cases(), {17}).write(path)
        change(path, {"table": {"cases": [whole | change_of_case]}})
        assert "rank-0.json: damaged: its table" in refusal(tmp_path, cases()), change_of_case


# ---------------------------------------------------------------------- one command a folder, stops


def images():
    return MemoryDataset([torch.full((3, 8, 8), i, dtype=torch.uint8) for i in range(4)], [])


def measure(image, target):
    table = MomentTable((2, 3))
    table.add((0, 1), image[0, 0, :1] / 255, image[0, 0, :1] / 255)
    return table, 1


def run(folder, function=measure):
    return measure_images(function, images(), World(), folder, State(FINGERPRINT, MomentTable((2, 3))))


def test_a_second_command_waits_outside(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    try:
        with pytest.raises(UserError, match="another analysis is running there: wait until it ends or stop it"):
            run(tmp_path)
    finally:
        lock.release()
    assert run(tmp_path).to_dict() == run(tmp_path).to_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["merged.json"]  # the lock is gone


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_keeps_what_is_done_and_says_so(tmp_path, capsys, number):
    seen = []

    def stopped(image, target):
        seen.append(target["image_id"])
        if len(seen) == 2:
            os.kill(os.getpid(), number)
        return measure(image, target)

    with pytest.raises(Stopped) as stop:
        run(tmp_path / "state", stopped)
    assert stop.value.code == 128 + number and seen == IDS[:2]
    said = f"stopped: 2 of the 4 images that were left are kept in {tmp_path / 'state'}; the same command continues"
    assert said in capsys.readouterr().out
    whole = run(tmp_path / "whole").to_dict()
    assert run(tmp_path / "state").to_dict() == whole
    assert "2 of 4 images are done already" in capsys.readouterr().out


def test_a_failure_gives_the_folder_back(tmp_path):
    def fails(image, target):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        run(tmp_path, fails)
    assert run(tmp_path).to_dict()["cells"]
