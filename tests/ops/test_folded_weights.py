"""`FoldedWeights` between streams and threads: nobody reads what is not written yet, and same-stream reads are free.

Without a GPU the streams are stand-ins that log what is asked of them.
"""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

from doublehead.ops import _folded
from doublehead.ops._folded import FoldedWeights


class Streams:
    """Stands in for CUDA's streams and events."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[tuple] = []
        self.capturing = False
        self.current = self.stream(1)
        monkeypatch.setattr(_folded, "STREAMING_DEVICES", ("cpu",))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, stream: self.log.append(("used on", stream.cuda_stream))
        )

    def stream(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(
            cuda_stream=handle, wait_event=lambda event: self.log.append(("waits", handle, event.recorded))
        )

    def event(self) -> SimpleNamespace:
        event = SimpleNamespace(recorded=None)

        def record(stream) -> None:
            event.recorded = stream.cuda_stream
            self.log.append(("recorded", stream.cuda_stream))

        event.record = record
        return event


@pytest.fixture
def streams(monkeypatch):
    return Streams(monkeypatch)


class Doubled:
    """A user of `FoldedWeights`: twice a weight, beside what is no tensor."""

    def __init__(self) -> None:
        self.weight, self.folded, self.calls = torch.ones(3), FoldedWeights(), 0

    def __call__(self, kind=None) -> torch.Tensor:
        return self.folded.get([self.weight], kind, self.make)[1][0]

    def make(self):
        self.calls += 1
        return "kind", [self.weight * 2]


def test_the_own_stream_waits_for_nothing(streams):
    doubled = Doubled()
    for _ in range(3):
        assert doubled().eq(2).all()
    assert doubled.calls == 1 and streams.log == [("recorded", 1)]


def test_another_stream_waits_once(streams):
    doubled = Doubled()
    doubled()
    for handle in (2, 2, 1, 3, 2):
        streams.current = streams.stream(handle)
        doubled()
    waits = [("waits", 2, 1), ("used on", 2), ("waits", 3, 1), ("used on", 3)]
    assert doubled.calls == 1 and streams.log == [("recorded", 1), *waits]


def test_a_new_fold_is_waited_for_anew(streams):
    doubled = Doubled()
    doubled()
    streams.current = streams.stream(2)
    doubled()
    doubled.weight.add_(1)
    assert doubled().eq(4).all()
    streams.current = streams.stream(1)
    doubled()
    assert streams.log[-3:] == [("recorded", 2), ("waits", 1, 2), ("used on", 1)]


def test_a_capture_does_not_wait(streams):
    # An event from outside would end the capture with an error; what was folded before it began is written.
    doubled = Doubled()
    doubled()
    streams.current, streams.capturing = streams.stream(2), True
    made = doubled()
    assert doubled.calls == 1 and streams.log == [("recorded", 1)]
    streams.capturing = False
    assert doubled() is made and ("waits", 2, 1) in streams.log  # the capture is not taken for a wait


def test_what_a_capture_makes_belongs_to_its_graph(streams):
    doubled = Doubled()
    streams.capturing = True
    first, second = doubled(), doubled()
    assert doubled.calls == 2 and first is not second and not streams.log
    streams.capturing = False
    assert doubled() is not second and doubled.calls == 3


def test_threads_never_mix_kinds(monkeypatch):
    # Another thread looks in the middle of a change: it must see the old fold or the new one, never a mixture.
    doubled, seen = Doubled(), []
    old = doubled.folded.get([doubled.weight], "old", doubled.make)
    write = FoldedWeights.__setattr__

    def look(self, name, value):
        write(self, name, value)
        seen.append(doubled.folded.get([doubled.weight], "old", lambda: old))

    monkeypatch.setattr(FoldedWeights, "__setattr__", look)
    doubled.folded.get([doubled.weight], "new", doubled.make)
    assert seen and all(made is old for made in seen)


def test_copies_and_pickles_are_empty():
    doubled = Doubled()
    doubled()
    old = FoldedWeights.__new__(FoldedWeights)
    old.__setstate__({"_seen": [], "_kind": None, "_made": None})  # as pickles have it
    for other in (copy.deepcopy(doubled.folded), pickle.loads(pickle.dumps(doubled.folded)), old):
        assert isinstance(other, FoldedWeights) and other.tensors() == []
        assert other.get([doubled.weight], None, doubled.make)[1][0].eq(2).all()


def test_inside_a_transform_nothing_is_remembered():
    folded = FoldedWeights()
    weights = torch.arange(6.0).view(2, 3)
    made = torch.vmap(lambda weight: folded.get([weight], None, lambda: weight * 2))(weights)
    assert made.equal(weights * 2) and folded.tensors() == []


@pytest.mark.gpu
def test_a_second_stream_sees_what_the_first_one_writes():
    weight = torch.ones(1 << 20, device="cuda")
    folded, first, second = FoldedWeights(), torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()

    def make() -> torch.Tensor:
        made = torch.zeros_like(weight)
        torch.cuda._sleep(200_000_000)  # about 0.1 s: a stream that does not wait reads the zeros
        return made.add_(weight).mul_(2)

    for _ in range(2):
        with torch.cuda.stream(first):
            folded.get([weight], None, make)
        with torch.cuda.stream(second):
            read = folded.get([weight], None, make).clone()
        second.synchronize()
        assert read.eq(2).all()
        folded.forget()


@pytest.mark.gpu
def test_a_capture_reads_what_another_stream_folded():
    weight, folded = torch.ones(1 << 10, device="cuda"), FoldedWeights()
    torch.cuda.synchronize()  # the weight is written, before another stream reads it
    with torch.cuda.stream(torch.cuda.Stream()):
        made = folded.get([weight], None, lambda: weight * 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = folded.get([weight], None, lambda: weight * 3) + 1
    graph.replay()
    torch.cuda.synchronize()
    assert folded.tensors()[0] is made and out.eq(3).all()
