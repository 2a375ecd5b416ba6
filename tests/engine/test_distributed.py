"""How long processes wait for each other."""

import pytest

from doublehead.engine import distributed
from doublehead.engine.distributed import LONG, TIMEOUT, join_world


@pytest.fixture
def world(monkeypatch):
    """Rank 1 of two, whose groups are their time limits."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, timeout: iter([(None, 1, 2)]))
    monkeypatch.setattr(distributed.dist, "PrefixStore", lambda *_: None)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(distributed.dist, name, lambda *_, **__: None)
    monkeypatch.setattr(distributed.dist, "new_group", lambda backend, timeout: timeout)
    with join_world("cpu") as found:
        yield found


@pytest.mark.parametrize("long, limit", [(False, TIMEOUT), (True, LONG)])
def test_long_waits_have_a_limit_of_their_own(world, monkeypatch, long, limit):
    used = []

    def broadcast(outcome, src, group):
        used.append(group)
        outcome[0] = "the main process's"

    monkeypatch.setattr(distributed.dist, "broadcast_object_list", broadcast)
    monkeypatch.setattr(distributed.dist, "barrier", lambda group: used.append(group))
    assert world.on_main(lambda: "mine", long=long) == "the main process's"
    world.barrier(long=long)
    assert used == [limit, limit]
