"""Threads around a model: order, bounds, errors, and that nothing goes on after the end."""

import threading
import time

import pytest
import torch

from doublehead.engine.streaming import Clock, Uploader, batches, default_threads, in_order


def test_results_come_in_order_whoever_is_first():
    released = threading.Event()

    def work(number):
        if number == 0:
            assert released.wait(10)  # the first is done last
        if number == 3:
            released.set()
        return number * 10

    assert list(in_order(work, range(20), threads=4, ahead=4)) == [number * 10 for number in range(20)]


def test_no_more_than_asked_is_under_way():
    taken, given = [], []

    def items():
        for number in range(50):
            taken.append(number)
            assert len(taken) - len(given) <= 6
            yield number

    for result in in_order(lambda number: number, items(), threads=2, ahead=5):
        given.append(result)
    assert given == list(range(50))


def test_a_finished_result_does_not_wait_for_others():
    given = []

    def items():
        yield 0
        deadline = time.monotonic() + 10
        while not given:
            assert time.monotonic() < deadline, "the first result is held back"
            time.sleep(0.01)
            yield 1

    for number in in_order(lambda number: number, items(), threads=1, ahead=10**6):
        given.append(number)
    assert given[0] == 0


@pytest.mark.parametrize("error", [ZeroDivisionError, MemoryError, KeyboardInterrupt])
def test_an_error_is_raised_in_its_turn_and_ends_the_work(error):
    begun = []

    def work(number):
        begun.append(number)
        if number == 5:
            raise error
        return number

    before = threading.active_count()
    results = []
    with pytest.raises(error):
        for result in in_order(work, range(1000), threads=2, ahead=8):
            results.append(result)
    assert results == [0, 1, 2, 3, 4] and len(begun) < 20
    assert threading.active_count() == before


def test_closing_drops_what_has_not_begun():
    begun = []
    stream = in_order(lambda number: begun.append(number) or time.sleep(0.01), range(1000), threads=1, ahead=50)
    next(stream)
    stream.close()
    assert len(begun) < 50
    now = len(begun)
    time.sleep(0.05)
    assert len(begun) == now


def test_batches():
    assert list(batches(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(batches([], 2)) == []


def test_the_clock_sums_over_threads():
    clock = Clock()

    def work(_):
        with clock.measure("work"):
            time.sleep(0.02)

    list(in_order(work, range(6), threads=3, ahead=6))
    assert clock.seconds["work"] >= 0.12
    with pytest.raises(ZeroDivisionError), clock.measure("broken"):
        raise ZeroDivisionError
    assert "broken" in clock.seconds


def test_threads_of_this_machine():
    assert 1 <= default_threads() <= 8


def test_on_the_cpu_images_stay_where_they_are():
    uploader = Uploader(torch.device("cpu"))
    image = torch.zeros(3, 4, 5, dtype=torch.uint8)
    kept, copy, there = uploader.send(image)
    assert kept is image and uploader.receive(copy, there) is image


@pytest.mark.gpu
def test_on_a_gpu_images_arrive():
    uploader = Uploader(torch.device("cuda"))
    images = [torch.randint(0, 256, (200, 300, 3), dtype=torch.uint8).permute(2, 0, 1) for _ in range(30)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = []
        for host, copy, there in in_order(uploader.send, images, threads=4, ahead=4):
            assert host.is_pinned()
            found.append(uploader.receive(copy, there).float() + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for image, result in zip(images, found, strict=True):
        assert torch.equal(result.cpu(), image.float() + 1)
