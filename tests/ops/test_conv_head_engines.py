"""Which library runs which product of the conv-head on a GPU, and that the data flows between them as it should."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear
from torch.utils._python_dispatch import TorchDispatchMode

from doublehead.ops.conv_head import reference as definition
from doublehead.ops.conv_head.arguments import pack
from doublehead.ops.conv_head.blocks import Block, each_block
from doublehead.ops.fused_conv import reference as fused_conv_reference
from doublehead.ops.fused_conv.arguments import FusedConvArguments
from doublehead.ops.non_local.reference import non_local_attention
from tests.support.interpreter import TRITON_DEVICE
from tests.support.precision import assert_as_exact, convolution_eps
from tests.support.vendor_products import vendor_products  # noqa: F401  (a fixture)

pytest.importorskip("triton")
from doublehead.ops import cublas, cudnn  # noqa: E402
from doublehead.ops.conv_head import launch  # noqa: E402
from doublehead.ops.fused_conv import engines  # noqa: E402
from doublehead.ops.fused_conv.engines import Engine, Product  # noqa: E402

HALF, FLOAT32 = torch.bfloat16, torch.float32
SHAPES = {
    Block.WIDENING: [(16, 16, 3, 3), (16,), (32, 32), (32,)],
    Block.WIDENING_SHORTCUT_RELU: [(16, 16, 3, 3), (16,), (32, 16), (32,), (32, 16), (32,)],
    Block.NON_LOCAL: [(48, 32), (48,), (32, 16), (32,)],
    Block.BOTTLENECK: [(16, 32), (16,), (16, 16, 3, 3), (16,), (32, 16), (32,)],
}
K5 = [Block.WIDENING, *2 * [Block.NON_LOCAL, Block.BOTTLENECK]]
ROIS = 100  # enough rows for every entry of the table


def head(blocks, number: int = ROIS, relu: bool = True, dtype: torch.dtype = FLOAT32, count=None):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        values = torch.randn(shape, generator=generator)
        return values.to(dtype).contiguous(
            memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format
        )

    shapes = [shape for block in blocks for shape in SHAPES[block]]
    tensors = [normal(*shape) * math.prod(shape[1:]) ** -0.5 for shape in shapes]  # float16 holds the last map
    (arguments,) = pack(normal(number, 16, 7, 7), tensors, blocks, count, 1, False, 1 / 49, relu)
    return arguments


@pytest.fixture
def plain_attention_and_mean(monkeypatch):
    """What stays Triton's, in plain PyTorch, so that results can be equal to the bit."""
    monkeypatch.setattr(engines.kernel, "fused_conv", lambda conv, fill: fused_conv_reference.fused_conv(conv))
    monkeypatch.setattr(
        launch, "non_local_attention", lambda qkv, attention, count: non_local_attention(qkv, attention)
    )


@pytest.fixture
def tf32_everywhere(monkeypatch):
    """PyTorch lets matrix products use TF32 too."""
    monkeypatch.setattr(cublas, "matmul_precision", lambda dtype: "tf32")


def by_hand(arguments) -> Tensor:
    """The conv-head written out in PyTorch: 1x1 convolutions are matrix products but where a residual is added."""
    number, height, width = len(arguments.x), *arguments.x.shape[2:]

    def maps(rows):
        return rows.view(number, height, width, -1).permute(0, 3, 1, 2)

    def rows_of(maps):
        return maps.permute(0, 2, 3, 1).reshape(number * height * width, -1)

    def three(rows, weight, bias):
        return rows_of(conv2d(maps(rows), weight, bias, padding=1)).relu()

    def added(rows, weight, bias, to):
        return rows_of(conv2d(maps(rows), weight[:, :, None, None], bias)) + to

    x = rows_of(arguments.x)
    steps = list(each_block(arguments.blocks, arguments.tensors))
    for index, (block, own) in enumerate(steps):
        last = index == len(steps) - 1
        if block == Block.WIDENING:
            x = linear(torch.cat((three(x, *own[:2]), x), 1), *own[2:]).relu()
        elif block == Block.WIDENING_SHORTCUT_RELU:
            x = added(three(x, *own[:2]), *own[2:4], linear(x, *own[4:]).relu()).relu()
        elif block == Block.BOTTLENECK:
            inner = three(linear(x, *own[:2]).relu(), *own[2:4])
            # the last one ends with the average, in the kernel's reference
            x = linear(inner, *own[4:]) + x if last else added(inner, *own[4:], x)
            x = x.relu()
        else:
            qkv = linear(x, *own[:2]).view(number, height * width, -1)
            x = added(non_local_attention(qkv, arguments.attention).flatten(0, 1), *own[2:], x)
            x = x.relu() if arguments.relu else x
    return x.view(number, height * width, -1).mean(1)


@pytest.mark.usefixtures("vendor_products", "plain_attention_and_mean", "tf32_everywhere")
@pytest.mark.parametrize("blocks", [K5, [Block.WIDENING_SHORTCUT_RELU, Block.BOTTLENECK]], ids=["K=5", "MMDetection's"])
def test_products_of_the_vendor_are_those_of_pytorch(blocks):
    arguments = head(blocks)
    before = arguments.x.clone()
    assert launch.conv_head(arguments).equal(by_hand(arguments))
    assert arguments.x.equal(before)


class Operators(TorchDispatchMode):
    """The names of ATen's operators that are called; views left out."""

    VIEWS = {"view", "permute", "_unsafe_view", "t", "transpose", "unsqueeze", "slice", "detach", "alias", "reshape"}

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if name not in self.VIEWS:
            self.names.append(name)
        return function(*arguments, **(keywords or {}))


@pytest.mark.usefixtures("vendor_products", "tf32_everywhere")
def test_launches_of_the_paper_s_head(monkeypatch):
    """One for each product and each attention; one more joins two inputs, two show what is not finite."""
    names = ["attention", "product"]
    ours = []
    monkeypatch.setattr(torch, "_addmm_activation", torch._C._VariableFunctions._addmm_activation)
    monkeypatch.setattr(
        engines.kernel, "fused_conv", lambda conv, fill: ours.append("product") or conv.x.new_zeros(ROIS, 32)
    )
    monkeypatch.setattr(
        launch,
        "non_local_attention",
        lambda qkv, attention, count: ours.append("attention") or torch.zeros(ROIS, 49, 16),
    )
    arguments = head(K5)
    with Operators() as called:
        launch.conv_head(arguments)
    wanted = {
        "cudnn_convolution_relu": 3,
        "cudnn_convolution_add_relu": 3,
        "_addmm_activation": 3,
        "addmm": 2,
        "cat": 1,
        "sum": 1,
        "add_": 1,
    }
    found = [name for name in called.names if name not in ("zeros", "new_zeros", "zero_", "new_empty", "empty")]
    assert {name: found.count(name) for name in set(found)} == wanted
    assert [ours.count(name) for name in names] == [2, 1]


@pytest.mark.skipif(TRITON_DEVICE == "cuda", reason="stand-ins on CPU tensors; test_a_gpu_s_libraries is without them")
@pytest.mark.usefixtures("vendor_products", "triton_kernels")
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_results_with_our_kernels_between(relu, dtype):
    """With few RoIs too, and where a residual without ReLU is the Triton kernel's."""
    arguments = head(K5, number=4, relu=relu, dtype=dtype)
    wide = arguments._replace(x=arguments.x.double(), tensors=[tensor.double() for tensor in arguments.tensors])
    exact, plain = definition.conv_head(wide), definition.conv_head(arguments)
    error = (launch.conv_head(arguments).double() - exact).abs().max()
    assert 0 < error <= 2 * (plain.double() - exact).abs().max()


@pytest.mark.usefixtures("vendor_products", "plain_attention_and_mean")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen(value):
    """The vendors' ReLU may hide it."""
    arguments = head(K5)
    expected = launch.conv_head(arguments)
    arguments.x[2, 3, 4, 5] = value
    found = launch.conv_head(arguments)
    assert found[2].isnan().all()
    others = torch.arange(ROIS) != 2
    assert found[others].equal(expected[others])


@pytest.mark.usefixtures("vendor_products", "plain_attention_and_mean")
def test_rows_counted_on_the_device_are_ours(monkeypatch):
    """No vendor's kernel leaves out rows by a number that is on the device."""
    seen = []
    run = engines.run
    monkeypatch.setattr(engines, "run", lambda conv, engine: seen.append(engine) or run(conv, engine))
    launch.conv_head(head(K5, count=torch.tensor(3)))
    assert set(seen) == {Engine.TRITON} and len(seen) == 12


def conv(kind: Product, dtype: torch.dtype = HALF, rows: int = 49_000) -> FusedConvArguments:
    """Arguments of a kind of product, of the paper's widths, without memory."""

    def tensor(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    bias, size = tensor(256), [7, 7]
    plain = FusedConvArguments(tensor(rows, 256), tensor(256, 256), bias, None, None, None, size, True, False)
    return {
        Product.SPATIAL: plain._replace(weight=tensor(256, 256, 3, 3)),
        Product.ACTIVATED: plain,
        Product.LINEAR: plain._replace(relu=False),
        Product.JOINED: plain._replace(weight=tensor(256, 512), second=tensor(rows, 256)),
        Product.ADDED: plain._replace(residual=tensor(rows, 256)),
        Product.OTHER: plain._replace(mean=True),
    }[kind]


def choice(given: FusedConvArguments, capability=(9, 0)) -> Engine:
    return engines.choose(given, capability, engines.available(given.x.device, given.x.dtype))


@pytest.fixture
def meta_as_cuda(monkeypatch):
    for module in (cublas, cudnn):
        monkeypatch.setattr(module, "DEVICES", ("meta",))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)


@pytest.mark.usefixtures("meta_as_cuda")
@pytest.mark.parametrize(
    ("kind", "half", "float32"),
    [
        (Product.SPATIAL, Engine.CUDNN, Engine.CUDNN),
        (Product.ACTIVATED, Engine.CUBLAS, Engine.CUDNN),
        (Product.LINEAR, Engine.CUBLAS, Engine.CUDNN),
        (Product.JOINED, Engine.CUBLAS, Engine.CUDNN),
        (Product.ADDED, Engine.CUDNN, Engine.CUDNN),
        (Product.OTHER, Engine.TRITON, Engine.TRITON),
    ],
)
def test_the_table_for_an_h200(kind, half, float32):
    assert choice(conv(kind, torch.bfloat16)) == half
    assert choice(conv(kind, torch.float16)) == half
    assert choice(conv(kind, FLOAT32)) == float32  # PyTorch's own switches: TF32 for convolutions alone
    assert choice(conv(kind, torch.float64)) == Engine.TRITON
    assert choice(conv(kind), (0, 0)) == Engine.TRITON


@pytest.mark.usefixtures("meta_as_cuda")
def test_the_table_elsewhere(monkeypatch):
    assert choice(conv(Product.JOINED, rows=4500)) == Engine.CUBLAS
    assert choice(conv(Product.JOINED, rows=4499)) == Engine.TRITON
    assert choice(conv(Product.JOINED), (8, 9)) == choice(conv(Product.JOINED), (12, 0)) == Engine.TRITON
    assert choice(conv(Product.JOINED), (10, 0)) == Engine.CUBLAS
    assert choice(conv(Product.ADDED, rows=2**23 - 1)) == Engine.CUDNN  # of 256 channels: under 2^31 elements
    assert choice(conv(Product.ADDED, rows=2**23)) == Engine.TRITON
    assert choice(conv(Product.ACTIVATED, rows=2**23)) == Engine.CUBLAS
    assert choice(conv(Product.LINEAR), (8, 0)) == Engine.CUBLAS
    assert choice(conv(Product.LINEAR, FLOAT32), (8, 6)) == Engine.TRITON
    assert choice(conv(Product.ADDED), (12, 0)) == Engine.CUDNN
    monkeypatch.setattr(cublas, "matmul_precision", lambda dtype: "tf32")
    assert choice(conv(Product.LINEAR, FLOAT32)) == Engine.CUBLAS
    monkeypatch.setattr(cublas, "convolution_precision", lambda dtype: "ieee")
    assert choice(conv(Product.LINEAR, FLOAT32), (8, 0)) == Engine.TRITON
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # the fused convolutions do not read it
    assert choice(conv(Product.ADDED)) == Engine.TRITON


@pytest.mark.usefixtures("meta_as_cuda", "poisoned")
def test_where_pytorch_is_deterministic_all_is_ours():
    assert {choice(conv(kind)) for kind in Product} == {Engine.TRITON}


@pytest.mark.usefixtures("meta_as_cuda")
def test_what_no_vendor_s_kernel_does_is_ours():
    full = {kind: conv(kind) for kind in Product}
    changed = {
        "count": full[Product.ACTIVATED]._replace(count=torch.tensor(3)),
        "no bias": full[Product.ACTIVATED]._replace(bias=None),
        "a residual without ReLU": full[Product.ADDED]._replace(relu=False),
        "a residual of two inputs": full[Product.JOINED]._replace(residual=full[Product.ADDED].residual),
        "a residual of a 3x3": full[Product.SPATIAL]._replace(residual=full[Product.ADDED].residual),
        "a 3x3 without ReLU": full[Product.SPATIAL]._replace(relu=False),
        "two inputs without ReLU": full[Product.JOINED]._replace(relu=False),
        "an average": full[Product.ADDED]._replace(mean=True),
    }
    for name, given in changed.items():
        assert choice(given) == Engine.TRITON, name


def test_products_of_cublas():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((30, 8), (6, 8), (6,)))
    assert cublas.product(x, weight, bias).equal(linear(x, weight, bias))
    assert cublas.product(x, weight, bias, relu=True).equal(linear(x, weight, bias).relu())


def test_cublas_is_a_gpu_s():
    assert not cublas.is_available(torch.device("cpu"), HALF)
    assert cublas.is_available(torch.device("cuda"), HALF) and cublas.is_available(torch.device("cuda"), torch.float16)
    assert not cublas.is_available(torch.device("cuda"), torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("number", [4, ROIS])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_s_libraries(dtype, relu, number):
    """All entries of the table run, alone and in a captured graph, and what is not finite is seen."""

    def moved(arguments, *where):
        return arguments._replace(x=arguments.x.to(*where), tensors=[tensor.to(*where) for tensor in arguments.tensors])

    given = head(K5, number, relu, dtype)
    exact = definition.conv_head(moved(given, torch.float64))
    given = moved(given, "cuda")
    plain = definition.conv_head(given)
    with torch.no_grad():
        actual = launch.conv_head(given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = launch.conv_head(given)
        eps = convolution_eps("cuda", dtype)
        assert_as_exact(actual, plain, exact, roundings=2 * len(given.tensors), eps=eps)
        graph.replay()
        assert captured.equal(actual)
        given.x[2, 3, 2, 1] = torch.nan
        graph.replay()
        assert captured.isnan().any(1).nonzero().flatten().tolist() == [2]
