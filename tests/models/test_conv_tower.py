"""The conv-head's three ways give one result: folded, fused in training, and module by module."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from doublehead.config import HeadConfig, NonLocalConfig
from doublehead.exporting.program import exact_float32
from doublehead.models.conv_tower import Bottleneck, ConvTower, WideningBlock
from doublehead.models.folding import fold_norm
from doublehead.models.towers import FCTower
from doublehead.ops import cudnn
from doublehead.ops._fallback import fallbacks
from tests.support.precision import assert_as_exact, convolution_eps
from tests.support.triton_bfloat16 import upcast_products  # noqa: F401  (a fixture)

CONFIGS = {
    "K=1": HeadConfig(conv_dim=32, conv_blocks=1),
    "K=3, no non-local": HeadConfig(conv_dim=32, conv_blocks=3, non_local=NonLocalConfig(enabled=False)),
    "K=5": HeadConfig(conv_dim=32, conv_blocks=5),
    "K=3, embedded Gaussian": HeadConfig(
        conv_dim=32,
        conv_blocks=3,
        non_local=NonLocalConfig(pairwise="embedded_gaussian", groups=1, scale=True, relu_after=False),
    ),
    "K=3, another inner width": HeadConfig(conv_dim=32, conv_blocks=3, non_local=NonLocalConfig(inner_dim=192)),
    "K=3, ReLU after the shortcut": HeadConfig(conv_dim=32, conv_blocks=3, shortcut_relu=True),
}


def tower(config: HeadConfig, dtype: torch.dtype = torch.float64, channels: int = 16) -> ConvTower:
    """A tower whose weights and statistics are nothing special: no zeros, no ones."""
    torch.manual_seed(0)
    made = ConvTower(channels, config).to(dtype)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d):
            spread = 0.3 if module.bias is not None else 1  # dot products of dot products: float16 must hold them
            nn.init.normal_(module.weight, 0, spread * (2 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.2)
    return made


def plain(fused: ConvTower) -> ConvTower:
    """The same, module by module."""
    made = copy.deepcopy(fused)
    made.fused = False
    return made


def maps(number: int, dtype: torch.dtype = torch.float64, size: int = 7, channels: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(number, channels, size, size, generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------
# Inference


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("number", [0, 3, 40])  # 40: more than a chunk
def test_folded_equals_plain(name, number):
    model, x = tower(CONFIGS[name]).eval(), maps(number)
    with torch.no_grad():
        assert model.can_skip(x)
        torch.testing.assert_close(model(x), plain(model)(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model(x.contiguous()), plain(model)(x), rtol=1e-9, atol=1e-9)  # NCHW


@pytest.mark.parametrize("count", [0, 1, 32, 33, 40])
def test_only_the_first_count_rois_are_computed(count):
    model, x = tower(CONFIGS["K=5"]).eval(), maps(40)
    with torch.no_grad():
        expected = plain(model)(x)
        x[count:] = torch.nan
        actual = model(x, torch.tensor(count))
    torch.testing.assert_close(actual[:count], expected[:count], rtol=1e-9, atol=1e-9)
    assert (actual[count:] == 0).all()


@pytest.mark.usefixtures("upcast_products")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_inference(triton_kernels, poisoned, name, dtype):
    if dtype == torch.bfloat16 and triton_kernels == "cpu" and name == "K=5":
        pytest.skip("Triton's interpreter cuts bfloat16 off where a GPU rounds, which shows after five blocks")
    config = dataclasses.replace(CONFIGS[name], conv_dim=128)  # widths that the kernels serve: 32 inner, 16 a group
    exact = tower(config).eval()
    model, x = copy.deepcopy(exact).to(triton_kernels, dtype), maps(3, dtype).to(triton_kernels)
    with torch.no_grad(), fallbacks() as heard:
        wanted, eager = exact(x.double().cpu()), plain(model)(x)
        count = torch.tensor(2, device=triton_kernels)
        actual, counted = model(x), model(x, count)
    assert not heard
    allowed = {"roundings": 2 * layers(model), "eps": convolution_eps(triton_kernels, dtype)}
    allowed = allowed if allowed["eps"] else {}
    assert_as_exact(actual, eager, plain(exact)(x.double().cpu()).detach(), name, **allowed)
    torch.testing.assert_close(wanted, plain(exact)(x.double().cpu()))
    assert (counted[2:] == 0).all()
    if triton_kernels == "cpu":
        assert counted[:2].equal(actual[:2])
    else:  # without a count most products are cuBLAS's and cuDNN's there
        assert_as_exact(counted[:2], eager[:2], wanted[:2].detach(), name, **allowed)


def test_autocast_computes_in_its_dtype():
    model, x = tower(CONFIGS["K=5"], torch.float32).eval(), maps(3, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, eager = model(x), plain(model)(x)
    assert actual.dtype == eager.dtype == torch.bfloat16
    assert_as_exact(actual, eager, tower(CONFIGS["K=5"]).eval()(x.double()).detach(), "bfloat16")


def test_inference_exports_and_compiles_whole():
    model, x = tower(CONFIGS["K=5"]).eval(), maps(3)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1).step(),
        lambda model: model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()}),
        lambda model: model.load_state_dict({n: v * 1.5 for n, v in model.state_dict().items()}, assign=True),
        lambda model: model[0].residual[1].running_mean.add_(1),
        lambda model: setattr(model[0].residual[0].weight, "data", model[0].residual[0].weight.data * 2),
        lambda model: (model[0].residual[0].weight.data.mul_(2), model.train(), model.eval()),
        lambda model: (model[0].residual[0].weight.data.mul_(2), model._folded.forget()),
    ],
    ids=["optimizer", "load", "load by assignment", "statistics", "data replaced", "mode switched", "forget"],
)
def test_weights_are_folded_again_when_they_change(change):
    model, x = tower(CONFIGS["K=3, no non-local"]).eval(), maps(3)
    with torch.no_grad():
        before = model(x)
        assert model(x).equal(before)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    change(model)
    with torch.no_grad():
        after = model(x)
        assert not after.allclose(before)
        torch.testing.assert_close(after, plain(model)(x), rtol=1e-9, atol=1e-9)


def test_weights_are_folded_once(monkeypatch):
    model, x = tower(CONFIGS["K=3, no non-local"]).eval(), maps(3)
    calls = []
    fold = ConvTower._fold
    monkeypatch.setattr(ConvTower, "_fold", lambda self, dtype: calls.append(dtype) or fold(self, dtype))
    for context in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with context():
            model(x)
    assert calls == [torch.float64]


def test_a_weight_that_is_not_finite_shows_on_a_gpu(monkeypatch):
    """The ReLU of cuDNN and cuBLAS may hide it; the last bias does not go through it."""
    model = tower(CONFIGS["K=3, no non-local"], torch.float16).eval()
    with torch.no_grad():
        _, here = model._fold(torch.float16)
        monkeypatch.setattr(cudnn, "DEVICES", ("cpu",))
        _, there = model._fold(torch.float16)
        assert all(one.equal(other) for one, other in zip(here, there, strict=True))
        model[0].residual[1].running_mean[3] = torch.inf
        assert model._fold(torch.float16)[1][-1].isnan().all()


def test_weights_made_in_inference_mode_are_folded_each_time():
    with torch.inference_mode():
        model, x = tower(CONFIGS["K=1"]).eval(), maps(2)
        model(x)
        model[0].residual[0].weight.mul_(2)
        torch.testing.assert_close(model(x), plain(model)(x))


def test_gradients_in_eval_mode_go_through_the_modules():
    model, x = tower(CONFIGS["K=3, no non-local"]).eval(), maps(2).requires_grad_()
    assert not model.can_skip(x)
    assert torch.autograd.grad(model(x).sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_fc_tower_takes_channels_last_maps_as_they_lie(memory_format):
    model = FCTower(16, 7, 24).double().eval()
    x = maps(5).contiguous(memory_format=memory_format)
    expected = nn.Sequential.forward(model, x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
        model[1].weight.mul_(2)
        torch.testing.assert_close(model(x), nn.Sequential.forward(model, x), rtol=1e-9, atol=1e-9)
    assert model(x.requires_grad_()).requires_grad


# ---------------------------------------------------------------------------------------------
# Training


def step(model: ConvTower, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Result, all gradients and running statistics of one training step."""
    model.train()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y).sin()
    (y * weights).sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return {"result": y.detach(), "gradient of x": x.grad, **gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_fused_training_equals_plain(name, recompute):
    model, x = tower(CONFIGS[name]), maps(6)
    expected = step(plain(model), x)
    model.recompute = recompute
    actual = step(model, x)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


def layers(model: nn.Module) -> int:
    """How many convolutions round one after the other, at most."""
    return sum(isinstance(layer, nn.Conv2d) for layer in model.modules())


def check_training_in_float32(name: str, device: str, gradients: bool = True) -> None:
    """Result, running statistics, and gradients of the input and of every weight, bias and norm, by the 2x rule."""
    exact = tower(CONFIGS[name])
    model, x = copy.deepcopy(exact).to(device, torch.float32), maps(2, torch.float32)
    wanted, eager = step(plain(exact), x.double()), step(plain(model), x.to(device))
    actual = step(model, x.to(device))
    scale = max(value.abs().max() for key, value in wanted.items() if key.startswith("gradient"))
    eps = convolution_eps(device, torch.float32)
    for key, value in wanted.items():
        if key.startswith("gradient") and not gradients:
            continue
        if key.endswith("num_batches_tracked"):
            assert actual[key] == value
        elif value.abs().max() > 1e-9 * scale:
            assert_as_exact(actual[key], eager[key], value, key, 2 * layers(model), eps)  # roundings there and back
        else:  # a bias before a batch norm: its gradient is 0, and computed as noise
            assert actual[key].abs().max() < 1e-4 * scale


@pytest.mark.parametrize("name", ["K=3, no non-local", "K=3, ReLU after the shortcut", "K=3, embedded Gaussian", "K=5"])
def test_triton_training(triton_kernels, poisoned, name):
    """Without TF32: its roundings push some cells over a ReLU's edge, where gradients jump; float32's are too small.

    Of some 10,000 cells before ReLUs the nearest to 0 is 2e-5 of their spread away, and TF32 flips 3 to 7.  Plain
    PyTorch's gradients are then off by up to 0.35 of the largest, and by less than 0.006 with the exact step's ReLUs.
    """
    with exact_float32():
        check_training_in_float32(name, triton_kernels)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_training_in_tf32(name):
    """As PyTorch's switches are: what does not jump."""
    check_training_in_float32(name, "cuda", gradients=False)


@pytest.fixture
def two_threads():
    """Sums are split by the number of threads, and with one the fused ones of two cases round worse than 2x."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CONFIGS)
def test_cpu_training_in_float32(two_threads, name):
    check_training_in_float32(name, "cpu")


@pytest.mark.parametrize("name", CONFIGS)
def test_cpu_inference_in_float32(name):
    exact = tower(CONFIGS[name]).eval()
    model, x = copy.deepcopy(exact).float(), maps(40, torch.float32)
    with torch.no_grad():
        assert_as_exact(model(x), plain(model)(x), plain(exact)(x.double()), name)


@pytest.mark.parametrize("name", ["K=3, no non-local", "K=5"])
def test_training_under_autocast(name):
    exact = tower(CONFIGS[name])
    model, x = copy.deepcopy(exact).float(), maps(6, torch.float32)
    wanted = step(plain(exact), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager, actual = step(plain(model), x), step(model, x)
    assert all(actual[key].dtype == eager[key].dtype for key in wanted)

    def error(got: dict[str, torch.Tensor]) -> float:
        """Mean over all results: bfloat16's error of a single small one is chance."""
        floating = {key: value for key, value in wanted.items() if value.is_floating_point()}
        relative = [(got[key].double() - value).norm() / (value.norm() + 1) for key, value in floating.items()]
        return torch.stack(relative).mean().item()

    assert 0 < error(actual) <= 1.5 * error(eager) < 0.2


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Memory of all tensors the backward remembers, parameters and the input not counted."""
    storages = {}

    def remember(tensor):
        storages[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        y = model(x)
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters(), *model.buffers())}
    del y
    return sum(size for pointer, (size, _) in storages.items() if pointer not in known)


def test_fused_training_remembers_less():
    config = HeadConfig(conv_dim=256)  # large enough for maps to matter, not weights
    model = ConvTower(64, config).train()
    x = maps(64, torch.float32, channels=64).requires_grad_()
    eager = saved_bytes(plain(model), x)
    fused = saved_bytes(model, x)
    model.recompute = True
    least = saved_bytes(model, x)
    assert fused <= 0.7 * eager
    assert least <= 0.55 * eager


def test_other_norms_go_through_the_modules():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(tower(CONFIGS["K=3, no non-local"], torch.float32))
    assert not model.eval().can_skip(maps(2, torch.float32)) and not model.train().trains_fused()
    frozen = tower(CONFIGS["K=3, no non-local"]).train()
    frozen[0].residual[1].eval()
    assert not frozen.trains_fused()
    torch.testing.assert_close(frozen(maps(3)), plain(frozen)(maps(3)))


def test_blocks_alone_are_modules():
    assert Bottleneck(16)(torch.randn(2, 16, 7, 7)).shape == (2, 16, 7, 7)
    assert WideningBlock(8, 16)(torch.randn(2, 8, 7, 7)).shape == (2, 16, 7, 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_fold_is_rounded_once(dtype):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(8, 16, 1, bias=False).to(dtype), nn.BatchNorm2d(16).to(dtype).eval()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    wide = fold_norm(copy.deepcopy(conv).float(), copy.deepcopy(norm).float())
    for found, exact in zip(fold_norm(conv, norm), wide, strict=True):
        assert found.dtype == dtype and found.equal(exact.to(dtype))
