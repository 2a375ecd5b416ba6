"""The emulator that runs CUDA kernels on the CPU: right kernels give the right result, and mistakes are found.

Threads and blocks run in several orders, and blocks also in turns. What stays uncovered: races between single
instructions, as turns end at barriers, collectives and atomics alone; the memory model and missing fences, as all
threads see every write at once; how a device schedules warps, and whether blocks that wait for each other would ever
run side by side; accesses outside of global memory, but for those that the callers' guards
catch; registers, occupancy and time.  On a device compute-sanitizer looks for some of these.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.cuda_emulation.build import HERE, IN_ORDER, ORDERS, ROOT, Order, every_order, open_emulated


def run(name, *arguments, order=IN_ORDER):
    open_emulated("emulation_test.cpp").call(f"run_{name}", *arguments, order=order)


def numbers(count):
    return torch.arange(count, dtype=torch.int32), torch.full((count,), -7, dtype=torch.int32)


@every_order
def test_threads_of_a_block_meet_at_a_barrier(order):
    given, result = numbers(288)
    run("rotate", given, result, True, order=order)
    assert torch.equal(result.view(3, 96), given.view(3, 96).roll(-1, 1))


ROTATE = """
import torch
from tests.cuda_emulation.build import open_emulated
given, result = torch.arange(288, dtype=torch.int32), torch.zeros(288, dtype=torch.int32)
open_emulated("emulation_test.cpp").call("run_rotate", given, result, True)
assert torch.equal(result.view(3, 96), given.view(3, 96).roll(-1, 1))
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_compiler_that_checks_jumps_by_itself(tmp_path):
    """As Ubuntu's does: a jump to another stack then ends the process, unless it is told otherwise."""
    compiler = tmp_path / "g++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} -D_FORTIFY_SOURCE=2 "$@"\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ROTATE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_missing_barrier_shows_in_another_order():
    given, result = numbers(288)
    expected = given.view(3, 96).roll(-1, 1)
    wrong = []
    for order in ORDERS:
        run("rotate", given, result, False, order=order)
        wrong.append(not torch.equal(result.view(3, 96), expected))
    assert any(wrong)
    assert (result == torch.tensor(0xCDCDCDCD).int()).any()  # shared memory starts as garbage


def test_barrier_of_a_warp_in_place_of_the_blocks_shows_where_warps_run_ahead():
    given, result = numbers(288)
    right = []
    for order in ORDERS:
        run("rotate", given, result, 2, order=order)
        right.append(torch.equal(result.view(3, 96), given.view(3, 96).roll(-1, 1)))
    assert right == [not order.ahead for order in ORDERS] and not all(right)


@every_order
def test_warp_collectives(order):
    given, result = numbers(96)
    run("sum_of_warps", given, result, 32, order=order)
    assert result[:3].tolist() == given.view(3, 32).sum(1).tolist()
    run("two_places", result, True, order=order)
    assert result.tolist() == [16] * 96
    run("count_positive", given, result, order=order)
    assert result.tolist() == [1095] * 96


@every_order
def test_lane_that_has_returned_is_found(order):
    given, result = numbers(96)
    with pytest.raises(RuntimeError, match=r"waits at __shfl_xor_sync, .*, but thread \(\d+, 0, 0\).* has returned"):
        run("sum_of_warps", given, result, 31, order=order)


@every_order
def test_lanes_at_different_places_are_found(order):
    with pytest.raises(RuntimeError, match="never meet: .*__shfl_sync.*, but thread .*"):
        run("two_places", numbers(96)[1], False, order=order)
    with pytest.raises(RuntimeError, match=r"never meet: thread \(40, 0, 0\) .*__syncwarp.*, but .*__syncthreads"):
        run("barrier_of_most", numbers(96)[1], order=order)


def test_write_behind_shared_memory_is_found():
    result = numbers(1)[1]
    run("fill_shared", result, 100, 400)
    assert result.item() == torch.tensor(0xCDCDCDCD).int()
    with pytest.raises(RuntimeError, match="a write 0 bytes behind the end of the dynamic shared memory"):
        run("fill_shared", result, 101, 400)


def test_limits_of_the_device():
    with pytest.raises(RuntimeError, match="cannot have 300000 bytes of shared memory"):
        run("fill_shared", numbers(1)[1], 1, 300000)


# ---------------------------------------------------------------------------------------------
# Blocks


def count(name, *arguments, order):
    result = torch.zeros(1, dtype=torch.int32)
    run(name, result, *arguments, order=order)
    return result.item()


def test_blocks_that_rely_on_their_order_show():
    def lengths(order):
        result = torch.zeros(8, dtype=torch.int32)
        run("chain", result, order=order)
        return result.tolist()

    assert lengths(Order(blocks=0)) == lengths(Order(threads=7)) == list(range(1, 9))
    for blocks in (1, 7):
        assert lengths(Order(blocks=blocks)) != list(range(1, 9))


def test_updates_that_are_not_atomic_show_where_blocks_take_turns():
    assert [count("count_threads", True, order=order) for order in ORDERS] == [256] * len(ORDERS)
    assert [count("count_threads", False, order=order) == 256 for order in ORDERS] == [True, True, True, False]


def test_blocks_that_take_turns_are_under_way_at_once():
    for order, expected in (
        (Order(), 1),
        (Order(resident=2), 2),
        (Order(3, 7, resident=3), 3),
        (Order(resident=99), 8),
    ):
        most = torch.zeros(1, dtype=torch.int32)
        run("count_blocks_inside", torch.zeros(1, dtype=torch.int32), most, order=order)
        assert most.item() == expected


@pytest.mark.parametrize("blocks", [1, 2, 5])
@every_order
def test_blocks_of_a_cooperative_launch_wait_for_each_other(order, blocks):
    values, result, arrived = (torch.zeros(size, dtype=torch.int32) for size in (320, 64 * blocks, 1))
    run("rotate_blocks", values, result, arrived, True, True, blocks, order=order)
    expected = 2000 + (torch.arange(blocks) + 1) % blocks
    assert torch.equal(result.view(blocks, 64), expected.int()[:, None].expand(-1, 64))
    assert arrived.item() == 6 * blocks


@every_order
def test_blocks_that_do_not_wait_for_each_other_show(order):
    values, result, arrived = (torch.zeros(size, dtype=torch.int32) for size in (320, 320, 1))
    run("rotate_blocks", values, result, arrived, False, True, 5, order=order)
    assert not torch.equal(result.view(5, 64)[:, 0], 2000 + (torch.arange(5) + 1).int() % 5)


def test_blocks_that_wait_without_a_cooperative_launch_are_found():
    values, result, arrived = (torch.zeros(size, dtype=torch.int32) for size in (320, 320, 1))
    with pytest.raises(RuntimeError, match="a kernel that never ends"):
        run("rotate_blocks", values, result, arrived, True, False, 5)
    with pytest.raises(RuntimeError, match="a kernel that never ends"):
        run("wait_for", torch.zeros(1, dtype=torch.int32))


@every_order
def test_every_block_has_shared_memory_of_its_own(order):
    given, result = numbers(288)
    run("rotate_dynamic", result, order=order)
    assert torch.equal(result.view(3, 96), given.view(3, 96).roll(-1, 1))


def test_the_first_kernel_of_a_library_finds_its_shared_memory(tmp_path):
    # A library just loaded has no thread-local segment yet, and must not take that of another with the same kernels.
    copy = tmp_path / "emulation_test_copy.cpp"
    shutil.copy(HERE / "emulation_test.cpp", copy)
    given, result = numbers(288)
    for source in ("emulation_test.cpp", str(copy)):
        open_emulated(source).call("run_rotate", given, result.fill_(-7), True, order=Order(resident=3))
        assert torch.equal(result.view(3, 96), given.view(3, 96).roll(-1, 1))


def test_an_error_in_one_block_ends_all_of_them():
    interleaved = Order(resident=3)
    with pytest.raises(RuntimeError, match="a write 0 bytes behind the end of the dynamic shared memory"):
        run("fill_shared", numbers(1)[1], 101, 400, order=interleaved)
    test_every_block_has_shared_memory_of_its_own(interleaved)


def test_a_misaligned_access_of_several_numbers_is_found():
    given, result = numbers(16)
    run("copy_four", given, result, 4)
    assert result[:4].tolist() == [4, 5, 6, 7]
    with pytest.raises(RuntimeError, match=r"a misaligned access at emulation_test\.cpp:\d+, address 0x"):
        run("copy_four", given, result, 2)
    run("copy_four", given, result, 4)
