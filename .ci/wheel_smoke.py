"""Calls every operator of an installed doublehead on the CPU, and compares it with its reference.  Needs torch alone.

Called by .ci/wheel with the Python of the environment in which the wheel was installed; ends with an error where the
compiled part is not loaded, an operator is missing, or one gives another result than its definition in plain PyTorch.
"""

import sys
import warnings
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

CALLS = []


class Recorded(TorchDispatchMode):
    """Keeps arguments and results of every call of an operator of doublehead."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        results = function(*arguments, **(keywords or {}))
        if function.namespace == "doublehead":  # copies, as gradients are added to results in place
            CALLS.append((function._opname, *tree_map_only(torch.Tensor, torch.clone, (arguments, results))))
        return results


def main(checkout: str) -> None:
    """`checkout`: the folder from which doublehead must not come."""
    warnings.simplefilter("error", RuntimeWarning)  # a compiled part that is missing, broken or old
    import doublehead.ops
    from doublehead.ops import _library

    package = Path(doublehead.__file__).resolve().parent
    assert not package.is_relative_to(Path(checkout).resolve()), f"doublehead was imported from the checkout: {package}"
    assert "_C" not in _library.UNLOADED, _library.UNLOADED
    compiled = Path(sys.modules["doublehead._C"].__file__).resolve()
    assert compiled.parent == package, f"the compiled part is not the wheel's: {compiled}"

    torch.manual_seed(0)
    with Recorded():
        call_all(doublehead.ops)
    called = {name for name, _, _ in CALLS}
    assert called == set(_library.SCHEMAS), f"not called: {sorted(set(_library.SCHEMAS) - called)}"
    for name, arguments, results in CALLS:
        torch.testing.assert_close(
            results, _library.REFERENCES[name](*arguments), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    native = sorted(name for name in called if _library.native(name, "cpu"))
    expected = {"nms", "nms_padded", "pyramid_roi_align", "pyramid_roi_align_backward", "winograd"}
    expected |= _library.CPU_KERNELS
    assert set(native) == expected, f"without a kernel of their own: {sorted(expected - set(native))}"
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {compiled.name}: {len(CALLS)} calls of "
          f"{len(called)} operators give the references' results, {len(native)} by kernels of their own")  # fmt: skip


def call_all(ops) -> None:
    """Every public function with small inputs, and the gradients of those that have one."""
    from doublehead.ops import winograd
    from doublehead.ops.batch_norm import batch_norm_act_apply
    from doublehead.ops.conv_head import Block

    boxes = torch.rand(40, 4) * 40
    boxes[:, 2:] += boxes[:, :2] + 1
    scores, labels = torch.rand(40), torch.randint(0, 3, (40,))
    ops.nms(boxes, scores, 0.5)
    ops.batched_nms(boxes, scores, labels, 0.5)
    ops.nms_padded(boxes[None], scores[None], labels[None], 0.5, 20)

    levels = [torch.randn(2, 5, 96 // scale, 96 // scale, requires_grad=True) for scale in (4, 8, 16, 32)]
    rois = torch.cat([torch.randint(0, 2, (40, 1)).float(), boxes], dim=1)
    ops.roi_align(levels[0], rois, (7, 7), 0.25, 2, True).sum().backward()
    pooled = ops.multiscale_roi_align(
        levels, boxes.reshape(2, 20, 4), (7, 7), spatial_scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32], box_scales=(1.0, 1.3)
    )
    sum(each.square().sum() for each in pooled).backward()
    pool = ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    pool(dict(zip("0123", levels, strict=True)), [boxes[:25], boxes[25:]], [(96, 96)] * 2).sum().backward()

    rows, weight, bias = torch.randn(18, 8, requires_grad=True), torch.rand(8), torch.randn(8)
    normed, mean, invstd = ops.batch_norm_act(rows, weight, bias, rows.detach().roll(1))
    normed.square().sum().backward()
    batch_norm_act_apply(rows.detach(), mean, invstd, weight, bias, None, True)
    for pairwise in ("dot_product", "embedded_gaussian"):
        block = ops.NonLocalBlock(8, groups=2, pairwise=pairwise, relu_after=True)
        torch.nn.init.normal_(block.out.weight)
        block(torch.randn(3, 8, 3, 3, requires_grad=True)).square().sum().backward()
    maps = torch.randn(3 * 9, 4)
    ops.fused_conv(maps, torch.randn(6, 4), torch.randn(6), size=(3, 3), residual=torch.randn(27, 6))
    ops.fused_conv(maps, torch.randn(6, 4, 3, 3), torch.randn(6), size=(3, 3), mean=True)
    tensors = (torch.randn(4, 4, 3, 3), torch.randn(4), torch.randn(8, 8), torch.randn(8))
    ops.conv_head(torch.randn(3, 4, 3, 3), tensors, [Block.WIDENING])
    kernels, image = torch.randn(20, 9, 3, 3), torch.randn(2, 9, 7, 6)
    torch.testing.assert_close(
        winograd.convolution(image, winograd.pack(kernels), None, 20),
        torch.nn.functional.conv2d(image, kernels, padding=1),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip

    fc, conv = torch.randn(30, 4, requires_grad=True), torch.randn(30, 4, requires_grad=True)
    fused = torch.ops.doublehead.fuse_scores(fc, conv, "complementary")  # the public function leaves the CPU to PyTorch
    torch.testing.assert_close(ops.fuse_scores(fc, conv, "complementary"), fused)
    fused.square().sum().backward()
    ops.image_batch([torch.rand(3, 20, 30), torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8)], [(24, 36), (18, 14)],
                    (32, 64), [0.5] * 3, [0.25] * 3)  # fmt: skip
    found = ([torch.randn(2, 20, 4), torch.randn(2, 20, 4)], torch.randn(2, 20, 4, 4) / 5, boxes.reshape(2, 20, 4),
             torch.rand(2, 20) > 0.2, torch.tensor([[80, 80], [70, 90]]))  # fmt: skip
    ops.detections(*found, max_detections=10)
    # What `detections` calls on CUDA alone; the fusion is a number.
    torch.ops.doublehead.detections_by_class(*found, 1, 0.05, 0.5, 10, 0.0, 0.0, [10.0, 10.0, 5.0, 5.0])


if __name__ == "__main__":
    main(sys.argv[1])
