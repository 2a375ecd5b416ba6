"""The operator conv_head: what every operator owes, and its errors. Its results: tests/models/test_conv_tower.py."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from doublehead.ops import conv_head
from doublehead.ops.conv_head import Block
from doublehead.ops.conv_head import reference as definition
from doublehead.ops.conv_head.arguments import pack

ATTENTION = {"groups": 2, "softmax": True, "scale": 0.5, "relu": True}
SHAPES = {
    Block.WIDENING: [(8, 8, 3, 3), (8,), (16, 16), (16,)],
    Block.WIDENING_SHORTCUT_RELU: [(8, 8, 3, 3), (8,), (16, 8), (16,), (16, 8), (16,)],
    Block.NON_LOCAL: [(24, 16), (24,), (16, 8), (16,)],
    Block.BOTTLENECK: [(4, 16), (4,), (4, 4, 3, 3), (4,), (16, 4), (16,)],
}
BLOCKS = [Block.WIDENING, Block.NON_LOCAL, Block.BOTTLENECK]


def head(blocks, number: int = 5, dtype: torch.dtype = torch.float64, size=(7, 7)):
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for block in blocks for shape in SHAPES[block]]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 0.3 for shape in shapes]
    x = torch.randn(number, 8, *size, generator=generator, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last), tensors


@pytest.mark.parametrize(
    "blocks",
    [BLOCKS, [Block.WIDENING], [Block.WIDENING_SHORTCUT_RELU, Block.BOTTLENECK], [Block.WIDENING, Block.NON_LOCAL]],
    ids=lambda blocks: "-".join(block.name.lower() for block in blocks),
)
@pytest.mark.parametrize("size", [(7, 7), (5, 3), (14, 14)])
@pytest.mark.parametrize("count", [None, 0, 2, 5, 9])
def test_cpu_equals_the_definition(blocks, size, count):
    x, tensors = head(blocks, size=size)
    before = x.clone()
    count = None if count is None else torch.tensor(count)
    expected = definition.conv_head(*pack(x, tensors, blocks, count, *ATTENTION.values()))
    torch.testing.assert_close(conv_head(x, tensors, blocks, count, **ATTENTION), expected)
    assert x.equal(before)


@pytest.mark.parametrize("count", [None, 3])
def test_opcheck(count):
    x, tensors = head(BLOCKS, dtype=torch.float32)
    count = None if count is None else torch.tensor(count)
    arguments = (x, tensors, [int(block) for block in BLOCKS], count, *ATTENTION.values())
    opcheck(torch.ops.doublehead.conv_head.default, arguments)


def test_compiles_and_exports_in_one_graph():
    x, tensors = head(BLOCKS)
    count = torch.tensor(3)

    class Head(torch.nn.Module):
        def forward(self, x, count):
            return conv_head(x, tensors, BLOCKS, count, **ATTENTION)

    expected = Head()(x, count)
    torch.testing.assert_close(torch.compile(Head(), fullgraph=True, backend="aot_eager")(x, count), expected)
    torch.testing.assert_close(torch.export.export(Head(), (x, count)).module()(x, count), expected)


def test_there_is_no_gradient_and_it_says_so():
    x, tensors = head(BLOCKS)
    with pytest.raises(RuntimeError, match="conv_head has no gradient"):
        conv_head(x.requires_grad_(), tensors, BLOCKS, **ATTENTION).sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8)}, ValueError, r"x must have shape \[N, C, H, W\] .*, got \[2, 8\]"),
        ({"blocks": []}, ValueError, "blocks must begin with a widening one, got"),
        ({"blocks": [Block.BOTTLENECK]}, ValueError, "blocks must begin with a widening one, got .*BOTTLENECK"),
        ({"blocks": [Block.WIDENING]}, ValueError, "tensors must be 4 weights and biases for these blocks, got 14"),
        ({"x": torch.zeros(2, 8, 7, 7)}, TypeError, r"tensors\[0\] must have the dtype of x, torch.float32"),
        ({"count": torch.tensor([1])}, ValueError, "count must be a Tensor"),
        ({"count": torch.tensor(1.0)}, ValueError, "count must be a Tensor"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    x, tensors = head(BLOCKS)
    with pytest.raises(error, match=message):
        conv_head(**({"x": x, "tensors": tensors, "blocks": BLOCKS} | change))


@pytest.mark.gpu
def test_one_cuda_graph_serves_any_number_of_rois():
    x, tensors = head(BLOCKS, number=40, dtype=torch.float16)
    x, tensors = x.cuda(), [tensor.cuda() for tensor in tensors]
    count = torch.tensor(40, device="cuda")

    def run():
        return conv_head(x, tensors, BLOCKS, count, **ATTENTION)

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    for number in (0, 1, 17, 40):
        count.fill_(number)
        graph.replay()
        assert result.equal(run()), number
        assert (result[number:] == 0).all()
