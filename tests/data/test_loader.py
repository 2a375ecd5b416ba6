"""Batches: resumable, sharded, grouped without loss, mirrored exactly, and clean about processes and errors."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st

from doublehead.config import DataConfig
from doublehead.data import DataError, DataWarning, build_dataset, build_loader, horizontal_flip
from doublehead.data.loader import TrainBatches
from tests.support.data_samples import CocoFolder, picture

pytestmark = pytest.mark.filterwarnings("error::doublehead.data.DataWarning")  # only where a test expects one


def shapes(count: int = 12, flip: float = 0.0):
    return build_dataset(DataConfig(train_images=count, image_size=32), "train", horizontal_flip=flip)


def take(batches, count: int) -> list:
    return list(itertools.islice(batches, count))


def same(a, b) -> bool:
    """Two lists of (images, targets), bit for bit."""
    return len(a) == len(b) and all(
        len(xs) == len(ys)
        and all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
        and all(
            torch.equal(s["boxes"], t["boxes"]) and s["image_id"] == t["image_id"] for s, t in zip(ss, ts, strict=True)
        )
        for (xs, ss), (ys, ts) in zip(a, b, strict=True)
    )


def ids(batches) -> list[list[int]]:
    return [[target["image_id"] for target in targets] for _, targets in batches]


# The order of the training stream

STREAMS = {
    "groups": st.lists(st.integers(0, 1), min_size=1, max_size=25),
    "batch_size": st.integers(1, 5),
    "world_size": st.integers(1, 3),
    "seed": st.integers(0, 3),
}


def one_by_one(groups: list[int], size: int, seed: int):
    """The definition: images come in the order of each epoch's permutation and wait until their group fills a batch."""
    waiting: dict[int, list] = {0: [], 1: []}
    for epoch in itertools.count():
        for index in np.random.default_rng((seed, epoch)).permutation(len(groups)).tolist():
            queue = waiting[groups[index]]
            queue.append((epoch, index))
            if len(queue) == size:
                yield list(queue)
                queue.clear()


@given(**STREAMS, start=st.integers(0, 40))
@settings(deadline=None)
def test_ranks_share_the_batches_of_one_process(groups, batch_size, world_size, seed, start):
    size = batch_size * world_size
    wanted = take(itertools.islice(one_by_one(groups, size, seed), start, None), 12)
    ranks = [
        take(TrainBatches(np.array(groups), batch_size, seed, rank, world_size, start), 12)
        for rank in range(world_size)
    ]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == wanted
    assert all(len(part) == batch_size for rank in ranks for part in rank)


@given(**STREAMS)
@settings(deadline=None)
def test_no_image_is_lost_and_no_batch_mixed(groups, batch_size, world_size, seed):
    size = batch_size * world_size
    batches = take(TrainBatches(np.array(groups), size, seed, 0, 1, 0), 3 * len(groups) + 3)
    for group in set(groups):
        members = {index for index, value in enumerate(groups) if value == group}
        stream = [item for batch in batches if groups[batch[0][1]] == group for item in batch]
        assert all(index in members for _, index in stream)  # a batch is of its first image's group
        for epoch in range(len(stream) // len(members)):
            part = stream[epoch * len(members) : (epoch + 1) * len(members)]
            assert {e for e, _ in part} == {epoch} and {index for _, index in part} == members


def test_epochs_and_seeds_differ():
    def order(seed: int, epoch: int) -> list[int]:
        return [index for _, index in take(TrainBatches(np.zeros(50), 50, seed, 0, 1, epoch), 1)[0]]

    orders = [order(0, 0), order(0, 1), order(1, 0), list(range(50))]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_grouping_goes_by_landscape_and_portrait(test_data):
    data = build_dataset(DataConfig(format="coco", root=str(test_data / "tiny_coco")), "train")
    portrait = {i for i, (h, w) in zip(data.image_ids, data.image_sizes, strict=True) if w < h}
    assert 5 < len(portrait) < len(data) - 5
    batches = take(iter(build_loader(data, 4, train=True, seed=0, aspect_ratio_grouping=True)), 40)
    counts = [sum(i in portrait for i in batch) for batch in ids(batches)]
    assert set(counts) == {0, 4}
    mixed = ids(take(iter(build_loader(data, 4, train=True, seed=0)), 10))
    assert any(0 < sum(i in portrait for i in batch) < 4 for batch in mixed)


# What the loader yields


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_continues_the_stream_exactly(workers):
    data = shapes(flip=0.5)
    whole = take(iter(build_loader(data, 3, train=True, seed=4)), 11)
    rest = take(iter(build_loader(data, 3, train=True, seed=4, start_step=6, workers=workers)), 5)
    assert same(whole[6:], rest)
    assert not same(whole[5:10], rest)


def test_iterating_again_starts_again():
    loader = build_loader(shapes(flip=0.5), 3, train=True, seed=4, start_step=2)
    assert same(take(iter(loader), 3), take(iter(loader), 3))


def test_ranks_divide_what_one_process_sees():
    data = shapes(flip=0.5)
    alone = take(iter(build_loader(data, 6, train=True, seed=1)), 4)
    parts = [take(iter(build_loader(data, 2, train=True, seed=1, rank=r, world_size=3)), 4) for r in range(3)]
    together = [(sum((p[0] for p in step), []), sum((p[1] for p in step), [])) for step in zip(*parts, strict=True)]
    assert same(alone, together)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_global_random_states_alone_and_ignores_them(workers):
    data = shapes(flip=0.5)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = take(iter(build_loader(data, 3, train=True, seed=0, workers=workers)), 4)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    assert same(first, take(iter(build_loader(data, 3, train=True, seed=0, workers=workers)), 4))


def flipped(data, batches) -> list[bool]:
    """Whether each loaded image is mirrored.  (Noise makes no picture its own mirror image.)"""
    decisions = []
    for images, targets in batches:
        for image, target in zip(images, targets, strict=True):
            plain = data[data.image_ids.index(target["image_id"])][0]
            assert torch.equal(image, plain) or torch.equal(image, plain.flip(-1))
            decisions.append(not torch.equal(image, plain))
    return decisions


def test_flips_have_their_probability_and_change_with_epoch_and_seed():
    for probability, low, high in ((0.0, 0, 0), (0.25, 0.13, 0.37), (1.0, 1, 1)):
        data = shapes(20, flip=probability)
        assert low <= np.mean(flipped(data, take(iter(build_loader(data, 20, train=True, seed=0)), 10))) <= high

    def by_image(seed: int, epoch: int) -> dict[int, bool]:
        data = shapes(20, flip=0.5)
        batch = take(iter(build_loader(data, 20, train=True, seed=seed, start_step=epoch)), 1)
        return dict(zip(ids(batch)[0], flipped(data, batch), strict=True))

    assert by_image(0, 0) == by_image(0, 0)
    assert by_image(0, 0) != by_image(0, 1) and by_image(0, 0) != by_image(1, 0)


def test_evaluation_never_flips():
    data = shapes(7, flip=1.0)
    assert not any(flipped(data, build_loader(data, 2, train=False, seed=0)))


@pytest.mark.parametrize("world_size, batch_size", [(1, 3), (2, 3), (3, 4), (9, 2)])
def test_evaluation_shards_hold_every_image_once(world_size, batch_size):
    data = shapes(7)
    loaders = [
        build_loader(data, batch_size, train=False, seed=0, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    shards = [ids(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(shard) for shard in shards]
    assert sorted(i for shard in shards for batch in shard for i in batch) == data.image_ids
    for rank, shard in enumerate(shards):
        assert sum(shard, []) == data.image_ids[rank::world_size]  # in order
        assert all(len(batch) == batch_size for batch in shard[:-1])


def test_a_training_stream_has_no_length():
    with pytest.raises(TypeError):
        len(build_loader(shapes(), 2, train=True, seed=0))


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}, {"world_size": 0},
                                 {"workers": -1}, {"seed": -1}, {"start_step": -1}])  # fmt: skip
def test_arguments_are_checked(bad):
    name = next(iter(bad))
    with pytest.raises(ValueError, match=f"{name} is {bad[name]}"):
        build_loader(shapes(), **{"batch_size": 2, "train": True, "seed": 0, **bad})


# Mirroring


@given(
    boxes=st.lists(st.tuples(*[st.integers(0, 640)] * 4), max_size=5),
    width=st.integers(1, 640),
)
@settings(deadline=None)
def test_flip_is_exact(boxes, width):
    image = torch.arange(3 * 2 * width).reshape(3, 2, width).to(torch.uint8)
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) / 4,  # quarters of a pixel
        "labels": torch.arange(len(boxes)),
        "image_id": 3,
    }
    kept = target["boxes"].clone()
    mirrored, other = horizontal_flip(image, target)
    assert np.array_equal(mirrored.numpy(), image.numpy()[..., ::-1])
    expected = [[width - c / 4, b / 4, width - a / 4, d / 4] for a, b, c, d in boxes]
    assert other["boxes"].tolist() == expected
    assert torch.equal(other["labels"], target["labels"]) and other["image_id"] == 3
    assert torch.equal(target["boxes"], kept)  # the argument is as it was
    again, twice = horizontal_flip(mirrored, other)
    assert torch.equal(again, image) and torch.equal(twice["boxes"], kept)


def test_a_flipped_box_holds_the_same_pixels():
    image = torch.zeros(3, 8, 10, dtype=torch.uint8)
    image[:, 2:5, 1:4] = 255
    mirrored, target = horizontal_flip(
        image, {"boxes": torch.tensor([[1.0, 2, 4, 5]]), "labels": torch.tensor([1]), "image_id": 1}
    )
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    assert (mirrored[:, y1:y2, x1:x2] == 255).all() and mirrored.sum() == image.sum()


# Processes


def test_worker_processes_end_with_their_iterator():
    iterator = iter(build_loader(shapes(), 2, train=True, seed=0, workers=2))
    next(iterator)
    workers = torch.multiprocessing.active_children()
    assert len(workers) == 2
    iterator.close()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


INTERRUPTED = """
import os, signal, time
from doublehead.data import build_dataset, build_loader
from doublehead.config import DataConfig

got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: got.append(number))
data = build_dataset(DataConfig(train_images=12, image_size=32), "train")
iterator = iter(build_loader(data, 2, train=True, seed=0, workers=2))
next(iterator), next(iterator)  # one of each worker: both have begun
os.killpg(os.getpgid(0), signal.SIGINT)
os.killpg(os.getpgid(0), signal.SIGTERM)
time.sleep(1)
print(len([next(iterator) for _ in range(20)]), sorted(got) == [signal.SIGINT, signal.SIGTERM])
"""


def test_signals_to_the_process_group_leave_the_workers_alone():
    """Ctrl-C and a scheduler's SIGTERM: the trainer must be able to finish its step."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120, start_new_session=True
    )
    assert done.stdout.split() == ["20", "True"], done.stderr


SCRIPT = """
import sys, torch
from doublehead.data import build_dataset, build_loader
from doublehead.config import DataConfig

def save(rank, path, crash):
    data = build_dataset(DataConfig(train_images=12, image_size=32), "train", horizontal_flip=0.5)
    iterator = iter(build_loader(data, 3, train=True, seed=4, workers=2))
    torch.save([next(iterator) for _ in range(3)], path)
    if crash:
        raise RuntimeError("crashed on purpose")
    sys.exit(0)  # with the stream open

if __name__ == "__main__":
    path, method, way = sys.argv[1:]
    if way == "child":
        torch.multiprocessing.start_processes(save, (path, True), nprocs=1, start_method=method)
    torch.multiprocessing.set_start_method(method)
    save(0, path, way == "crash")
"""


@pytest.mark.parametrize("method, way", [("spawn", "exit"), ("fork", "crash"), ("fork", "child")])
def test_other_processes_give_the_same_batches_and_end(tmp_path, method, way):
    """Data set and loader travel to processes that inherit nothing; a stream left open holds up no exit."""
    script, out = tmp_path / "script.py", tmp_path / "out.pt"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(out), method, way], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode == 0) == (way == "exit") and ("crashed on purpose" in done.stderr) == (way != "exit")
    assert same(torch.load(out), take(iter(build_loader(shapes(flip=0.5), 3, train=True, seed=4)), 3))


# Images that turn out broken


def spoil(path) -> None:
    """Break the pixels, not the header nor the end: only decoding tells."""
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 255
    path.write_bytes(bytes(blob))


@pytest.fixture
def coco(tmp_path):
    """Five images with a box; the second has broken pixels."""
    sample = CocoFolder(tmp_path / "set")
    sample.content["images"] = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(1, 6)]
    sample.content["annotations"] = [sample.box(i, i, 3, [i, i, 9, 9]) for i in range(1, 6)]
    for i in range(1, 6):
        picture(sample.root / "train" / f"{i}.png")
    spoil(sample.root / "train" / "2.png")
    return sample


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_the_loader_with_its_name(coco, workers):
    loader = build_loader(build_dataset(coco.config(), "train"), 5, train=True, seed=0, workers=workers)
    with pytest.raises(DataError) as caught:
        next(iter(loader))
    assert str(caught.value).startswith(str(coco.root / "train" / "2.png"))
    assert "Traceback" not in str(caught.value) and caught.value.reason == "unreadable image"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_replaced_counted_and_told_once(coco, workers):
    data = build_dataset(coco.config(on_bad_record="skip"), "train")
    iterator = iter(build_loader(data, 5, train=True, seed=0, workers=workers))
    with pytest.warns(DataWarning, match="2.png") as caught:
        epochs = take(iterator, 3)
    iterator.close()
    assert len(caught) == 1 and data.skipped == {"unreadable image": 1}
    for images, targets in epochs:
        assert Counter(t["image_id"] for t in targets) == {1: 1, 3: 2, 4: 1, 5: 1}  # the next one in its place
        assert all(torch.equal(image, data[t["image_id"] - 1][0]) for image, t in zip(images, targets, strict=True))


def test_nothing_left_to_replace_it_with(coco):
    data = build_dataset(coco.config(on_bad_record="skip"), "train")
    for i in range(1, 6):
        (coco.root / "train" / f"{i}.png").unlink(missing_ok=True)
    with pytest.raises(DataError, match="no such image file"):
        next(iter(build_loader(data, 2, train=True, seed=0)))
