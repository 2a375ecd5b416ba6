"""torchvision's box head by oneDNN's products: as the layers in float64, and aside where they may not run."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead

from doublehead.interop.torchvision.accelerate import ORIGINAL, _put_back
from doublehead.interop.torchvision.folded import FOLDED, FoldedFastRCNNConvFCHead
from doublehead.models.folded import networks
from doublehead.ops import onednn
from tests.support.precision import assert_as_exact

pytestmark = pytest.mark.skipif(not onednn.is_available(torch.float32), reason="no such convolutions in this build")

ROWS = 19
"""Two blocks and a rest."""


def maps(last: bool = True) -> Tensor:
    x = torch.randn(ROWS, 20, 7, 7, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last) if last else x


def vectors() -> Tensor:
    return torch.randn(ROWS, 24, generator=torch.Generator().manual_seed(2))


def head() -> nn.Module:
    torch.manual_seed(0)
    return TwoMLPHead(20 * 49, 24).eval().requires_grad_(False)


def conv_head() -> nn.Module:
    torch.manual_seed(0)
    module = FastRCNNConvFCHead((20, 7, 7), [16, 16], [24, 24], norm_layer=nn.BatchNorm2d)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.5, 1.5)
    return module.eval().requires_grad_(False)


def predictor() -> nn.Module:
    torch.manual_seed(0)
    return FastRCNNPredictor(24, 5).eval().requires_grad_(False)


def folded(module: nn.Module) -> nn.Module:
    module.__class__ = FOLDED[type(module)]
    return module


@pytest.fixture(autouse=True)
def products(monkeypatch) -> list[Tensor]:
    """The rows that oneDNN's products were given."""
    given, linear = [], onednn.linear
    monkeypatch.setattr(onednn, "LINEAR_ROWS", 8)
    monkeypatch.setattr(onednn, "linear", lambda x, *a, **b: given.append(x) or linear(x, *a, **b))
    return given


@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "contiguous"])
@torch.no_grad()
def test_two_layers(products, last):
    x = maps(last)
    plain, exact, found = head()(x), head().double()(x.double()), folded(head())(x)
    assert_as_exact(found, plain, exact)
    assert len(products) == 2 and products[0].data_ptr() == x.data_ptr()  # read as it lies


@torch.no_grad()
def test_convolutions_before_the_layers(products, monkeypatch):
    convs, run = [], networks.run_steps
    monkeypatch.setattr(networks, "run_steps", lambda *a, **b: convs.append(1) or run(*a, **b))
    x = maps()
    plain, exact, found = conv_head()(x), conv_head().double()(x.double()), folded(conv_head())(x)
    assert_as_exact(found, plain, exact)
    assert len(products) == 2 and len(convs) == 1
    module = folded(conv_head())
    for forget in (nn.Module.eval, lambda module: _put_back(module, [FastRCNNConvFCHead])):
        module(x)
        assert module in networks._FOLDED and module[3] in networks._FOLDED
        forget(module)
        assert not any(part in networks._FOLDED for part in module.modules())
    assert type(module) is FastRCNNConvFCHead

    def parts(change) -> tuple[int, int]:
        convs.clear(), products.clear()
        module = folded(conv_head())
        change(module)
        torch.testing.assert_close(module(x), as_layers(module, x))
        return len(convs), len(products)

    assert parts(lambda module: module[0][0].register_forward_hook(lambda *_: None)) == (0, 2)
    assert parts(lambda module: module[2].register_forward_hook(lambda *_: None)) == (1, 0)
    assert parts(lambda module: module[4].register_forward_hook(lambda *_: None)) == (1, 0)
    assert parts(lambda module: setattr(module, "6", nn.ReLU6().eval())) == (1, 0)
    assert parts(lambda module: module.insert(2, nn.Flatten(2).eval())) == (0, 0)
    module = folded(FastRCNNConvFCHead((20, 7, 7), [], [24]).eval().requires_grad_(False))
    torch.testing.assert_close(module(x), as_layers(module, x))
    assert type(module) is FoldedFastRCNNConvFCHead and len(products) == 1


@torch.no_grad()
def test_both_outputs(products):
    x = vectors()
    for found, plain, exact in zip(
        folded(predictor())(x), predictor()(x), predictor().double()(x.double()), strict=True
    ):
        assert_as_exact(found, plain, exact)
        assert found.stride() == plain.stride() and found.untyped_storage().nbytes() == 4 * found.numel()
    assert len(products) == 1
    (narrow, wide), plain = folded(predictor())(x[:, :, None, None]), predictor()(x)
    torch.testing.assert_close((narrow, wide), plain)


CASES = [(head, "fc6", maps), (conv_head, "3", maps), (predictor, "cls_score", vectors)]


@pytest.mark.parametrize(("make", "name", "inputs"), CASES)
@torch.no_grad()
def test_remembered_beside_the_module(monkeypatch, make, name, inputs):
    packs, original = [], onednn.pack_linear
    monkeypatch.setattr(onednn, "pack_linear", lambda *a: packs.append(1) or original(*a))
    module, x = folded(make()), inputs()
    state, attributes = {key: value.clone() for key, value in module.state_dict().items()}, set(vars(module))
    first = module(x)
    once = len(packs)
    torch.testing.assert_close(module(x), first, rtol=0, atol=0)
    assert once > 0 and len(packs) == once
    torch.testing.assert_close(dict(module.state_dict()), state, rtol=0, atol=0)
    assert set(vars(module)) == attributes and module in networks._FOLDED

    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False), module):
        getattr(other, name).weight.mul_(-1.5)
        found, expected = other(x), as_layers(other, x)
        torch.testing.assert_close(found, expected)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    before = len(packs)
    module(x)
    assert len(packs) == before + once  # the layout follows from the number of threads
    module.train()(x)
    assert module not in networks._FOLDED


def as_layers(module: nn.Module, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """The result of torchvision's own class."""
    return ORIGINAL[type(module)].forward(module, x)


@torch.no_grad()
def test_other_shapes_and_formats_of_maps(products):
    module, x = folded(head()), maps(last=False)
    flat, tall = x.view(ROWS, 980), x.view(ROWS, 980, 1, 1)
    for inputs in (maps(), x, x.view(ROWS, 20, 49), x.transpose(2, 3), flat, tall, flat.t().contiguous().t()):
        torch.testing.assert_close(module(inputs), as_layers(module, inputs))
    assert len(products) == 2 * 7
    for wrong in (flat[:, 1:], maps()[:, 1:]):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            module(wrong)


@torch.no_grad()
def test_few_rows_run_the_layers(products):
    """What is packed serves blocks of rows."""
    module = folded(head())
    assert module(maps()[:7]).shape == (7, 24) and module(maps()[:0]).shape == (0, 24)
    assert products == [] and module not in networks._FOLDED


@torch.no_grad()
def test_nan_stays(products):
    x = maps()
    x[3, 0, 0, 0] = torch.nan
    assert folded(head())(x).isnan().any(1).tolist() == [row == 3 for row in range(ROWS)]


class OtherLinear(nn.Linear):
    pass


class Weird(Tensor):
    pass


GUARDS = {
    "hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "hook before": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "hook backward": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "another class": lambda layer: setattr(layer, "__class__", OtherLinear),
    "forward replaced": lambda layer: setattr(layer, "forward", layer.forward),
    "pruned": lambda layer: prune.identity(layer, "weight"),
    "parametrized": lambda layer: register_parametrization(layer, "weight", nn.Identity()),
    "without bias": lambda layer: setattr(layer, "bias", None),
    "in training": lambda layer: layer.train(),
    "compiled": lambda layer: layer.compile(backend="eager"),
    "tensor subclass": lambda layer: setattr(
        layer, "weight", nn.Parameter(layer.weight.as_subclass(Weird), requires_grad=False)
    ),
    "with gradients": lambda layer: layer.weight.requires_grad_(True),
}


@pytest.mark.parametrize(("make", "name", "inputs"), CASES)
@pytest.mark.parametrize("guard", GUARDS)
def test_who_watches_or_differs_is_served(products, guard, make, name, inputs):
    module = folded(make())
    GUARDS[guard](getattr(module, name))
    assert module(inputs()) is not None and products == []


@pytest.mark.parametrize(("make", "name", "inputs"), CASES)
def test_what_is_replaced_is_called(products, monkeypatch, make, name, inputs):
    module = folded(make())
    setattr(module, name, nn.Sequential(getattr(module, name)).eval())
    module(inputs())
    as_defined = ORIGINAL[type(module)].forward
    monkeypatch.setattr(ORIGINAL[type(module)], "forward", lambda self, x: "the class's")
    assert folded(make())(inputs()) == "the class's"
    monkeypatch.setattr(ORIGINAL[type(module)], "forward", as_defined)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight.t())
    torch.testing.assert_close(folded(make())(inputs()), as_layers(folded(make()), inputs()))
    assert products == []


@pytest.mark.parametrize(("make", "name", "inputs"), CASES)
def test_gradients_modes_and_tracers(products, make, name, inputs):
    module, x = folded(make()), inputs()
    outputs = module(x.clone().requires_grad_())
    assert (outputs if isinstance(outputs, Tensor) else outputs[0]).requires_grad and products == []
    with torch.autocast("cpu", torch.bfloat16):
        outputs = module(x)
        assert (outputs if isinstance(outputs, Tensor) else outputs[0]).dtype == torch.bfloat16
    folded(make()).double()(x.double())
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() > 0
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    module(x)
    handle.remove()
    torch.jit.trace(module, x, check_trace=False)
    compiled, exported = torch.compile(module, backend="eager", fullgraph=True), torch.export.export(module, (x,))
    torch.testing.assert_close(compiled(x), as_layers(module, x))
    torch.testing.assert_close(exported.module()(x), as_layers(module, x))
    torch.func.vmap(lambda y: module(y))(x[None])
    with torch.device("meta"):
        copy.deepcopy(module).to("meta")(torch.empty_like(x, device="meta"))
    assert products == []
    with torch.inference_mode():
        copy.deepcopy(module)(x)
        assert products == []
        module(x)
    assert products
