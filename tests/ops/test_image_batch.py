"""The image batch: torch's interpolate, the kernels against the definition in float64, gradients, torch, errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from doublehead.ops import image_batch
from doublehead.ops.image_batch import reference
from doublehead.ops.image_batch.arguments import ImageBatchArguments
from tests.support.triton_compile import Case, compile_cases

OPERATOR = torch.ops.doublehead.image_batch.default
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: (height, width) before and after: one pixel, a thin image, a tenth, larger, the same, one side each way.
RESIZES = [((1, 1), (9, 5)), ((7, 333), (3, 70)), ((120, 90), (12, 9)), ((5, 6), (21, 66)), ((13, 40), (13, 40)),
           ((9, 80), (22, 20))]  # fmt: skip
CANVAS = (22, 72)


def pictures(dtype=torch.uint8, sizes=None):
    generator = torch.Generator().manual_seed(0)
    images = []
    for height, width in sizes or [before for before, _ in RESIZES]:
        levels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        images.append(levels if dtype == torch.uint8 else (levels / 255).to(dtype))
    return images


def arguments(images, **changes):
    """The operator's, of an awkward batch."""
    values = dict(
        images=images, sizes=[side for _, after in RESIZES for side in after], height=CANVAS[0], width=CANVAS[1],
        mean=list(MEAN), std=list(STD), swap=False, rounded=False, dtype=torch.float32, channels_last=False,
    )  # fmt: skip
    return ImageBatchArguments(**values | changes)


def as_decoded(image):
    """The same image, channels last in memory."""
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)


# ---------------------------------------------------------------------------------------------
# The definition


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("swap", [False, True])
def test_each_image_is_interpolated_normalised_and_padded_with_zeros(dtype, swap):
    images = pictures(dtype)
    batch = image_batch(images, [after for _, after in RESIZES], CANVAS, MEAN, STD, swap=swap)
    assert batch.shape == (len(images), 3, *CANVAS) and batch.dtype == torch.float32
    for slot, image, (_, (height, width)) in zip(batch, images, RESIZES, strict=True):
        values = image.double() / (255 if dtype == torch.uint8 else 1)
        values = values[[2, 1, 0]] if swap else values
        normalised = (values - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD).double()[:, None, None]
        expected = interpolate(normalised[None], (height, width), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(slot[:, :height, :width].double(), expected, atol=2e-4, rtol=0)  # float32 places
        assert (slot[:, height:] == 0).all() and (slot[:, :, width:] == 0).all()


def test_rounding_gives_levels_halves_up():
    image = torch.tensor([[0, 1], [3, 7]], dtype=torch.uint8).expand(3, 2, 2)
    for given in (image, image / 255):
        batch = image_batch([given], [(1, 1)], (1, 1), (0, 0, 0), (1, 1, 1), rounded=True)
        assert (batch * 255).round(decimals=3).flatten().tolist() == [3.0] * 3  # (0 + 1 + 3 + 7) / 4 = 2.75
        half = image_batch([given[:, :1]], [(1, 1)], (1, 1), (0, 0, 0), (1, 1, 1), rounded=True)
        assert (half * 255).round(decimals=3).flatten().tolist() == [1.0] * 3  # 0.5
    beyond = torch.tensor([-0.5, 0.5, 1.5])[:, None, None]
    batch = image_batch([beyond], [(1, 1)], (1, 1), (0, 0, 0), (1, 1, 1), rounded=True)
    torch.testing.assert_close(batch.flatten(), torch.tensor([0, 128 / 255, 1]))


@pytest.mark.parametrize("swap", [False, True])
def test_gradcheck(swap):
    sizes = [(5, 4), (2, 7)]
    images = [image.double().requires_grad_() for image in pictures(torch.float64, [(3, 4), (4, 5)])]

    def batch(*images):
        return image_batch(images, sizes, (6, 8), MEAN, STD, swap=swap, dtype=torch.float64)

    assert torch.autograd.gradcheck(batch, images)


def test_rounding_lets_the_gradient_pass():
    plain, rounded = (image.clone().requires_grad_() for image in pictures(torch.float32, [(6, 5)]) * 2)
    weights = torch.rand(1, 3, 4, 8)
    for image, flag in ((plain, False), (rounded, True)):
        (image_batch([image], [(4, 3)], (4, 8), MEAN, STD, rounded=flag) * weights).sum().backward()
    torch.testing.assert_close(rounded.grad, plain.grad)
    assert plain.grad.abs().sum() > 0


def test_an_image_among_others_gets_its_gradient_and_the_values_stay():
    first, second = pictures(torch.float32, [(6, 5), (4, 4)])
    settings = ([(4, 3), (5, 5)], (8, 8), MEAN, STD)
    expected = image_batch([first, second], *settings)
    found = image_batch([first, second.requires_grad_()], *settings)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert second.grad is not None
    with torch.no_grad():
        assert not image_batch([first, second], *settings).requires_grad


def test_the_raw_operator_says_where_the_gradient_is():
    (image,) = pictures(torch.float32, [(4, 4)])
    batch = OPERATOR(*arguments([image.requires_grad_()], sizes=[4, 4]))
    with pytest.raises(RuntimeError, match="doublehead.ops.image_batch has one"):
        batch.sum().backward()


# ---------------------------------------------------------------------------------------------
# Every implementation


@pytest.fixture(params=["cpu", "triton"])
def device(request):
    return request.getfixturevalue("triton_kernels") if request.param == "triton" else "cpu"


def error(found, exact):
    return (found.double().cpu() - exact).abs().max()


@pytest.mark.parametrize(
    "given, dtype, swap, channels_last",
    [
        (torch.uint8, torch.float32, False, False),
        (torch.uint8, torch.float16, True, True),
        (torch.float32, torch.float32, True, False),
        (torch.float16, torch.float16, False, True),
    ],
)
def test_error_is_at_most_twice_that_of_plain_pytorch(device, poisoned, given, dtype, swap, channels_last):
    images = pictures(given)
    options = dict(swap=swap, channels_last=channels_last)
    exact = reference.image_batch(arguments(images, dtype=torch.float64, **options))
    naive = reference.image_batch(arguments(images, dtype=dtype, **options))
    found = OPERATOR(*arguments([image.to(device) for image in images], dtype=dtype, **options))
    assert found.dtype == dtype and found.stride() == naive.stride()
    assert error(found, exact) <= 2 * error(naive, exact) + torch.finfo(dtype).eps * exact.abs().max()
    for slot, (_, (height, width)) in zip(found, RESIZES, strict=True):
        assert (slot[:, height:] == 0).all() and (slot[:, :, width:] == 0).all()


@pytest.mark.parametrize("given", [torch.uint8, torch.float32])
def test_rounded_levels_are_the_definitions(device, poisoned, given):
    images = pictures(given)
    unit = dict(mean=[0.0] * 3, std=[1 / 255] * 3, rounded=True)
    expected = reference.image_batch(arguments(images, dtype=torch.float64, **unit))
    found = OPERATOR(*arguments([image.to(device) for image in images], **unit)).double().cpu()
    assert (found - found.round()).abs().max() < 1e-4  # whole levels
    difference = (found - expected).abs().round()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3  # a sum beside a half may fall either way


def test_exact_halves_are_rounded_up(device):
    image = torch.arange(0, 40, dtype=torch.uint8).reshape(1, 1, 40).expand(3, 1, 40)
    unit = dict(mean=[0.0] * 3, std=[1 / 255] * 3, rounded=True, height=1, width=20, sizes=[1, 20])
    found = OPERATOR(*arguments([image.to(device)], **unit))
    assert found[0, 0, 0].round().tolist() == [2 * level + 1 for level in range(20)]  # (2n + 2n + 1) / 2


@pytest.mark.parametrize(
    "layout, given",
    [("decoded", torch.uint8), ("sliced", torch.float32), ("columns", torch.uint8), ("expanded", torch.float32)],
)
def test_any_strides_are_read(device, poisoned, layout, given):
    images = pictures(given)
    if layout == "decoded":
        images = [as_decoded(image) for image in images]
    elif layout == "sliced":
        images = [image.repeat_interleave(2, 1).repeat_interleave(3, 2)[:, ::2, ::3] for image in images]
    elif layout == "columns":
        images = [image.transpose(1, 2).contiguous().transpose(1, 2) for image in images]
    else:
        images = [image[:1].expand(3, -1, -1) for image in images]
    expected = reference.image_batch(arguments([image.contiguous() for image in images]))
    found = OPERATOR(*arguments([image.to(device) for image in images]))
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-5)


def test_an_unfitting_canvas_and_mixed_dtypes(device, poisoned):
    """A canvas that is no multiple of a tile, and images of every dtype in one batch."""
    sizes = [(7, 9), (30, 4), (5, 5), (6, 6)]
    dtypes = [torch.uint8, torch.float32, torch.float16, torch.float64]
    images = [pictures(dtype, [size])[0] for dtype, size in zip(dtypes, sizes, strict=True)]
    changes = dict(sizes=[13, 17, 19, 3, 5, 5, 1, 67], height=19, width=67)
    expected = reference.image_batch(arguments(images, **changes))
    found = OPERATOR(*arguments([image.to(device) for image in images], **changes))
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-5)


def test_a_batch_in_float64_is_computed_in_float64(device):
    images = pictures(torch.float64)
    expected = reference.image_batch(arguments(images, dtype=torch.float64))
    found = OPERATOR(*arguments([image.to(device) for image in images], dtype=torch.float64)).cpu()
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-14)


def test_offsets_beyond_32_bits_are_seen():
    pytest.importorskip("triton")
    from doublehead.ops.image_batch.kernel import _wide

    small, huge = torch.empty(3, 10, 10), torch.empty((3, 40000, 30000), device="meta")
    assert not _wide(small, small) and _wide(huge, small) and _wide(small, huge)
    assert _wide(torch.empty(1, device="meta").as_strided((3, 2, 2), (2**30, 2, 1)), small)  # few elements, a far reach


def test_64_bit_offsets_give_the_same(triton_kernels, monkeypatch):
    from doublehead.ops.image_batch import kernel

    images = [image.to(triton_kernels) for image in pictures()]
    expected = OPERATOR(*arguments(images))
    monkeypatch.setattr(kernel, "_wide", lambda *_: True)
    assert torch.equal(OPERATOR(*arguments(images)), expected)


# ---------------------------------------------------------------------------------------------
# Inside torch


@pytest.mark.parametrize("dtype, channels_last", [(torch.float32, True), (torch.bfloat16, False)])
def test_opcheck(dtype, channels_last):
    for images in (pictures(), [as_decoded(image) for image in pictures(torch.float32)]):
        torch.library.opcheck(OPERATOR, tuple(arguments(images, dtype=dtype, channels_last=channels_last)))


def test_compiled_with_dynamic_shapes():
    def half(*images):
        sizes = [(image.shape[1] // 2 + 1, image.shape[2] // 2 + 1) for image in images]
        canvas = max(size[0] for size in sizes), max(size[1] for size in sizes)
        return image_batch(images, sizes, canvas, MEAN, STD) * 2

    compiled = torch.compile(half, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ([(20, 30), (16, 12)], [(33, 41), (50, 9)]):
        torch.testing.assert_close(compiled(*pictures(sizes=sizes)), half(*pictures(sizes=sizes)))
    leaves = [image.requires_grad_() for image in pictures(torch.float32, [(20, 30), (16, 12)])]
    grads = torch.autograd.grad(compiled(*leaves).sum(), leaves)
    torch.testing.assert_close(grads, torch.autograd.grad(half(*leaves).sum(), leaves))


def test_autocast_changes_nothing():
    expected = OPERATOR(*arguments(pictures()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(OPERATOR(*arguments(pictures())), expected)
    for key in ("AutocastCPU", "AutocastCUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("doublehead::image_batch", key)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(images=[]), ValueError, "images must hold at least one image, got an empty list"),
        (dict(sizes=[(4, 4), (4, 4)]), ValueError, "sizes must be one for each of the 1 images, got 2"),
        (dict(images=[torch.zeros(1, 4, 4)]), ValueError, r"images\[0\] must have shape \[3, h, w\].*\[1, 4, 4\]"),
        (dict(images=[torch.zeros(3, 4, 0)]), ValueError, r"images\[0\] must have shape.*not empty, got \[3, 4, 0\]"),
        (dict(images=[torch.zeros(3, 4, 4).int()]), TypeError, r"images\[0\] must be uint8, .*got torch.int32"),
        (dict(sizes=[(4, 0)]), ValueError, r"sizes\[0\] must be .* from 1 to canvas \(8, 8\), got \(4, 0\)"),
        (dict(sizes=[(9, 4)]), ValueError, r"sizes\[0\] must be .* from 1 to canvas \(8, 8\), got \(9, 4\)"),
        (dict(sizes=[(4, 9)]), ValueError, r"sizes\[0\]"),
        (dict(std=(1, 0, 1)), ValueError, r"std none that is 0, got .* and \(1, 0, 1\)"),
        (dict(mean=(1, 2)), ValueError, "mean and std must have 3 numbers"),
        (dict(dtype=torch.uint8), TypeError, "dtype must be float16, .* got torch.uint8"),
        (
            dict(images=[torch.zeros(3, 4, 4), torch.zeros(3, 4, 4, device="meta")], sizes=[(4, 4)] * 2),
            ValueError, r"images\[1\] must be on the device of images\[0\], cpu, got meta",
        ),
    ],
)  # fmt: skip
def test_errors(change, error, message):
    values = dict(images=[torch.zeros(3, 4, 4)], sizes=[(4, 4)], canvas=(8, 8), mean=MEAN, std=STD) | change
    with pytest.raises(error, match=message):
        image_batch(**values)


# ---------------------------------------------------------------------------------------------
# Compiled for GPUs that are not here


def test_compiled_kernels_do_not_spill():
    pytest.importorskip("triton")
    from doublehead.ops.image_batch.kernel import BLOCK_X, BLOCK_Y, WARPS

    counts = ("height", "width", "new_height", "new_width", "canvas_height", "canvas_width", "stride_c", "stride_y")
    numbers = ("ratio_y", "ratio_x", "levels", "gain_0", "gain_1", "gain_2", "bias_0", "bias_1", "bias_2")
    cases = []
    for image, batch, stride_x, last, wide in (
        ("*u8", "*fp32", 3, False, False), ("*u8", "*bf16", 3, True, True), ("*fp32", "*fp32", 1, False, False),
        ("*bf16", "*fp16", None, True, False),
    ):  # fmt: skip
        signature = {"image": image, "slot": batch} | dict.fromkeys(counts, "i32")
        signature |= {"stride_x": "i32"} if stride_x is None else {}
        signature |= dict.fromkeys(numbers, "fp32")
        constants = {"SWAP": True, "ROUNDED": True, "CHANNELS_LAST": last, "WIDE": wide}
        constants |= {"BLOCK_Y": BLOCK_Y, "BLOCK_X": BLOCK_X} | ({"stride_x": stride_x} if stride_x else {})
        cases.append(Case("doublehead.ops.image_batch.kernel", "_resize", signature, constants, WARPS, 3))
    for compiled in compile_cases(cases):
        assert compiled.stack == compiled.local == 0, compiled
        assert compiled.registers <= 64 and compiled.shared <= 1024, compiled
