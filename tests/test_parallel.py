"""The whole suite is divided among processes; a part of it that pytest is told to run is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.support import parallel
from tests.support.paths import ROOT

PLAIN = {"usepdb": False, "trace": False, "capture": "fd", "collectonly": False, "numprocesses": None}


def options_of(cores, source="TESTPATHS", **changed):
    """What `divide` returns, and the options it leaves."""
    option = SimpleNamespace(**PLAIN | {"dist": "no", "loadscopereorder": True} | changed)
    for name in [name for name, value in changed.items() if value is KeyError]:
        delattr(option, name)  # as without pytest-xdist
    config = SimpleNamespace(option=option, args_source=pytest.Config.ArgsSource[source])
    return parallel.divide(config, cores), option


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # what a test sets is gone afterwards
    monkeypatch.delenv("OMP_NUM_THREADS")


@pytest.mark.parametrize(("cores", "processes", "threads"), [(2, 2, "1"), (4, 4, "1"), (64, 4, "16")])
def test_every_core_has_work(cores, processes, threads):
    found, option = options_of(cores)
    assert found == option.numprocesses == processes
    assert option.dist == "loadfile" and not option.loadscopereorder
    assert parallel.os.environ["OMP_NUM_THREADS"] == threads


def test_a_number_of_threads_that_is_asked_for_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert options_of(2)[0] == 2 and parallel.os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    "changed",
    [
        {"source": "ARGS"},  # `pytest tests/ops/test_nms.py`
        {"source": "INVOCATION_DIR"},
        {"cores": 1},
        {"numprocesses": 0},
        {"numprocesses": 5},
        {"numprocesses": KeyError},
        {"usepdb": True},
        {"trace": True},
        {"capture": "no"},
        {"collectonly": True},
    ],
)
def test_what_runs_in_one_process(changed):
    found, option = options_of(**{"cores": 2} | changed)
    assert found == 0 and option.dist == "no" and option.loadscopereorder
    assert "OMP_NUM_THREADS" not in parallel.os.environ
    assert getattr(option, "numprocesses", KeyError) is changed.get("numprocesses")


def test_the_longest_files_come_first_and_the_others_keep_their_order(monkeypatch):
    monkeypatch.setattr(parallel, "LONGEST_FIRST", ("c.py", "b.py"))
    items = [SimpleNamespace(nodeid=name) for name in ("a.py::2", "b.py::1", "a.py::1", "c.py::2", "c.py::1")]
    parallel.longest_first(items)
    assert [item.nodeid for item in items] == ["c.py::2", "c.py::1", "b.py::1", "a.py::2", "a.py::1"]


def test_the_longest_files_exist():
    assert [name for name in parallel.LONGEST_FIRST if not (ROOT / name).is_file()] == []
