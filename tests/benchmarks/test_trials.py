"""The table of trials in docs/own-data.md says what docs/bccd.json holds."""

import json

import pytest

from tests.support.paths import ROOT


@pytest.fixture
def trials(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import trials

    return trials


def test_the_table_is_up_to_date(trials):
    assert trials.page() == trials.PAGE.read_text()


def test_every_seed_of_every_kind_counts(trials):
    recorded = json.loads(trials.RECORD.read_text())
    assert {(run["kind"], run["seed"]) for run in recorded["runs"]} == {
        (kind, seed) for kind in trials.KINDS for seed in trials.SEEDS
    }
    for run in recorded["runs"]:
        before = trials.table(recorded)
        kept, run["AP"] = run["AP"], run["AP"] + 0.1
        assert trials.table(recorded) != before
        run["AP"] = kept
