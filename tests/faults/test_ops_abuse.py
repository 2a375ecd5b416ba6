"""The operators under abuse: any value in any place, any layout, several threads, little memory.  Never a crash.

What is wrong must end in an exception that says so; what is right in the same answer, whatever the tensor's strides and
the number of threads.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from doublehead import ops

GENERATOR = torch.Generator().manual_seed(0)


def boxes(*shape: int) -> torch.Tensor:
    corner = torch.rand(*shape, 2, generator=GENERATOR) * 100
    return torch.cat((corner, corner + torch.rand(*shape, 2, generator=GENERATOR) * 50 + 1), -1)


BOXES, SCORES, GROUPS = boxes(50), torch.rand(50), torch.arange(50) % 3
MAPS = torch.randn(2, 8, 20, 24, generator=GENERATOR)
ROIS = torch.cat((torch.arange(50)[:, None] % 2, BOXES / 8), 1)
LOGITS, DELTAS, PROPOSALS = torch.randn(2, 50, 4), torch.randn(2, 50, 4, 4), boxes(2, 50)
VALID, SIZES = torch.ones(2, 50, dtype=torch.bool), torch.tensor([[100.0, 120]] * 2)
LEVELS = [MAPS, MAPS[..., ::2, ::2]]

#: name -> (operator, its right arguments)
CALLS = {
    "nms": (ops.nms, [BOXES, SCORES, 0.5]),
    "batched_nms": (ops.batched_nms, [BOXES, SCORES, GROUPS, 0.5]),
    "nms_padded": (ops.nms_padded, [BOXES[None], SCORES[None], GROUPS[None], 0.5, 20]),
    "roi_align": (ops.roi_align, [MAPS, ROIS, 7, 0.5, 2, True]),
    "multiscale_roi_align": (
        lambda x, rois, size, scales: ops.multiscale_roi_align(x, rois, size, spatial_scales=scales),
        [LEVELS, ROIS, 7, [0.25, 0.125]],
    ),
    "detections": (
        lambda logits, *others: ops.detections([logits, logits], *others[:-1], max_detections=others[-1]),
        [LOGITS, DELTAS, PROPOSALS, VALID, SIZES, 20],
    ),
    "fuse_scores": (ops.fuse_scores, [LOGITS[0], LOGITS[1], "complementary"]),
}

ONES = torch.ones(50, 4)
ANYTHING = [
    None, "x", -1, 0, 3, 2**63, 2**70, -(2**63), 1e308, float("nan"), float("inf"), True, [], (), {}, object(),
    torch.tensor(1.0), torch.tensor(3), torch.empty(0), torch.ones(3), ONES.int(), ONES.bool(),
    ONES.to(torch.complex64),
    torch.ones(2, 3, 4, 5, 6), ONES.to_sparse(), ONES.to("meta"), ONES.to_mkldnn(), np.ones((50, 4)),
    ONES.to(torch.float8_e4m3fn), torch.ones(50, 5), torch.ones(49, 4),
    torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(2, 4)]),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_anything_in_any_place_is_an_answer_or_an_exception_that_was_meant(name):
    call, right = CALLS[name]
    refused = 0
    for place in range(len(right)):
        for value in ANYTHING:
            arguments = [*right]
            arguments[place] = value
            try:
                call(*arguments)
            except (AttributeError, SystemError, NameError, ZeroDivisionError, RecursionError) as error:
                pytest.fail(f"argument {place} = {value!r}: {error!r}")
            except Exception as error:  # noqa: BLE001 - any other was meant
                assert not isinstance(error, AssertionError) or "must be" in str(error), error
                refused += 1
    assert refused > len(ANYTHING)


@pytest.mark.parametrize("name", CALLS)
def test_strides_do_not_matter(name):
    call, right = CALLS[name]
    expected = flat(call(*right))
    for place, value in enumerate(right):
        if isinstance(value, torch.Tensor):
            wide = value.new_zeros(*value.shape[:-1], 2 * value.shape[-1])[..., ::2].copy_(value)
            turned = value.transpose(0, -1).contiguous().transpose(0, -1)
            for same in (wide, turned, value.flip(0).flip(0), value.expand(1, *value.shape)[0]):
                arguments = [*right]
                arguments[place] = same
                for a, e in zip(flat(call(*arguments)), expected, strict=True):
                    torch.testing.assert_close(a, e)


def test_many_threads_at_once():
    expected = {name: flat(call(*right)) for name, (call, right) in CALLS.items()}
    wrong = []

    def work():
        for _ in range(5):
            for name, (call, right) in CALLS.items():
                for a, e in zip(flat(call(*right)), expected[name], strict=True):
                    if not torch.equal(a, e):
                        wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_the_number_of_threads_changes_nothing(number):
    before = torch.get_num_threads()
    many, scores, groups = boxes(6000), (torch.rand(6000) * 100).round(), torch.arange(6000) % 5

    def answers():
        maps = MAPS.clone().requires_grad_()
        ops.roi_align(maps, ROIS, 7, 0.5, 2, True).square().sum().backward()
        return [ops.batched_nms(many, scores, groups, 0.5), ops.roi_align(MAPS, ROIS, 7, 0.5), maps.grad]

    try:
        torch.set_num_threads(1)
        expected = answers()
        torch.set_num_threads(number)
        assert all(torch.equal(a, e) for a, e in zip(answers(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


HUGE = {
    "output": lambda: ops.nms_padded(BOXES[None], SCORES[None], GROUPS[None], 0.5, 2**62),
    "bins": lambda: ops.roi_align(MAPS, ROIS, 2**31),
    "more bins": lambda: ops.roi_align(MAPS, ROIS, 2**62),
    "samples": lambda: ops.roi_align(MAPS, ROIS[:1], 1, sampling_ratio=2**62),
    "detections": lambda: ops.detections([LOGITS], DELTAS, PROPOSALS, VALID, SIZES, max_detections=2**60),
}


@pytest.mark.parametrize("what", HUGE)
def test_more_than_memory_is_an_exception(what):
    with pytest.raises((RuntimeError, MemoryError, ValueError, OverflowError)):
        HUGE[what]()


def test_no_gradient_is_promised_that_is_not_there():
    rois = ROIS.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="the gradient of the boxes is not defined"):
        ops.roi_align(MAPS, rois, 7).sum().backward()
    assert not ops.nms(BOXES.clone().requires_grad_(), SCORES.clone().requires_grad_(), 0.5).requires_grad
    maps = MAPS.clone().requires_grad_()
    with torch.no_grad():
        assert not ops.roi_align(maps, ROIS, 7).requires_grad
    ops.roi_align(maps, ROIS, 7).backward(torch.ones(1).expand(50, 8, 7, 7))  # strides of 0
    expanded, maps.grad = maps.grad, None
    ops.roi_align(maps, ROIS, 7).backward(torch.ones(50, 8, 7, 7).transpose(2, 3))
    assert torch.equal(expanded, maps.grad)


def flat(answer):
    return [answer] if isinstance(answer, torch.Tensor) else list(answer)
