"""What the towers of all heads offer: an optional count, skipping, plain modules, and the tensors they hold."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from doublehead.config import HeadConfig
from doublehead.models.conv_tower import ConvTower
from doublehead.models.towers import Conv5Tower, FCTower, Tower
from doublehead.ops import NonLocalBlock, onednn
from tests.support.precision import assert_as_exact

CHANNELS, SIZE = 8, 7
TOWERS = {
    "fc": lambda: FCTower(CHANNELS, SIZE, 12),
    "conv": lambda: ConvTower(CHANNELS, HeadConfig(conv_dim=16, conv_blocks=3)),
    "conv5": lambda: Conv5Tower(nn.Conv2d(CHANNELS, 16, 3, padding=1)),
}


@pytest.fixture(params=TOWERS)
def tower(request):
    torch.manual_seed(0)
    made = TOWERS[request.param]().double()
    for layer in made.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight)
    return made.eval()


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, CHANNELS, SIZE, SIZE, dtype=torch.float64, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def test_it_is_a_tower(tower):
    assert isinstance(tower, Tower) and not isinstance(nn.Flatten(), Tower)


@torch.no_grad()
def test_the_first_rois_are_what_they_are_without_a_count(tower, maps):
    expected = tower(maps)
    assert expected.shape == (5, expected.shape[1])
    torch.testing.assert_close(tower(maps, torch.tensor(3))[:3], expected[:3], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_rois_behind_the_count_are_left_out_where_the_tower_can_skip(tower, maps):
    skips = tower.can_skip(maps)
    assert skips == isinstance(tower, ConvTower)
    found = tower(maps, torch.tensor(3))
    assert bool((found[3:] == 0).all()) == skips
    assert not tower.train().can_skip(maps)
    with torch.enable_grad():
        assert not tower.eval().can_skip(maps)


@torch.no_grad()
def test_a_plain_tower_has_the_same_results_and_skips_nothing(tower, maps):
    plain = copy.deepcopy(tower)
    assert plain.plain() is plain
    torch.testing.assert_close(plain(maps), tower(maps), rtol=1e-9, atol=1e-9)
    assert not plain.can_skip(maps)
    assert plain.state_dict().keys() == tower.state_dict().keys()


@torch.no_grad()
def test_blocks_make_maps_of_maps(tower, maps):
    x = maps
    for block in tower.blocks:
        x = block(x)
    if isinstance(tower, FCTower):
        assert len(tower.blocks) == 0
    else:
        torch.testing.assert_close(x.mean((2, 3)), tower(maps))


@torch.no_grad()
def test_held_tensors_are_what_the_last_call_has_read(tower, maps):
    assert tower.held_tensors() == []
    expected = tower(maps)
    held = tower.held_tensors()
    assert bool(held) == (not isinstance(tower, Conv5Tower))
    tower(maps)
    assert all(first is second for first, second in zip(tower.held_tensors(), held, strict=True))
    for tensor in held[:1]:  # made of the first weight: the next call reads it, and not that weight
        tensor.zero_()
    assert tower(maps).equal(expected) == (not held)
    tower.train().eval()
    assert tower.held_tensors() == []
    assert tower(maps).equal(expected)


@torch.no_grad()
@pytest.mark.parametrize("before", [False, True])
def test_hooks_on_layers_run(tower, maps, before):
    expected, called = tower(maps), []
    layer = next(layer for layer in tower.modules() if isinstance(layer, (nn.Conv2d, nn.Linear)))
    register = layer.register_forward_pre_hook if before else layer.register_forward_hook
    hook = register(lambda *arguments: called.append(arguments[0]))
    torch.testing.assert_close(tower(maps), expected, rtol=1e-9, atol=1e-9)
    assert called == [layer]
    if isinstance(tower, ConvTower):
        assert not tower.train().trains_fused()
    hook.remove()
    tower.eval()
    assert tower(maps).equal(expected) and called == [layer]


@torch.no_grad()
def test_hooks_on_all_modules_run(tower, maps):
    expected, called = tower(maps), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    found = tower(maps)
    hook.remove()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert next(layer for layer in tower.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))) in called


@torch.no_grad()
def test_a_layer_that_is_appended_runs(tower, maps):
    expected = tower(maps)
    tower.append(nn.Threshold(-1.0, -1.0).eval()).append(nn.Softmax(1).eval())
    torch.testing.assert_close(tower(maps), expected.softmax(1), rtol=1e-9, atol=1e-9)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def made_again(layer, kind):
    """A layer of another kind with the settings and weights of `layer`."""
    other = copy.deepcopy(layer)
    other.__class__ = kind
    return other


def wider(conv):
    """A convolution with the weights of `conv` that looks further."""
    other = copy.deepcopy(conv)
    other.dilation, other.padding = (2, 2), (2, 2)
    return other


OTHER_LAYERS = {
    "fc: a kind of linear layer": ("fc", "1", lambda layer: made_again(layer, DoubledLinear)),
    "fc: a linear layer in a module": ("fc", "3", lambda layer: nn.Sequential(layer)),
    "fc: without bias": ("fc", "1", lambda layer: nn.Linear(layer.in_features, layer.out_features, bias=False)),
    "fc: an activation": ("fc", "2", lambda layer: nn.GELU()),
    "conv: a kind of convolution": ("conv", "0.residual.3", lambda layer: made_again(layer, Doubled)),
    "conv: another convolution": ("conv", "2.residual.3", wider),
    "conv: no norm": ("conv", "2.residual.1", lambda layer: nn.Identity()),
    "conv: an activation": ("conv", "2.residual.2", lambda layer: nn.GELU()),
    "conv: a shortcut": ("conv", "0.shortcut", lambda layer: nn.Sequential(*layer, nn.Tanh())),
    "conv: a block": ("conv", "2", lambda layer: nn.Sequential(layer, nn.Tanh())),
    "conv: of a non-local block": ("conv", "1.theta", lambda layer: made_again(layer, Doubled)),
    "conv: the average": ("conv", "3", lambda layer: nn.AdaptiveMaxPool2d(1)),
}


@torch.no_grad()
@pytest.mark.parametrize("case", OTHER_LAYERS)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_layers_of_others_are_called(case, memory_format):
    kind, name, replace = OTHER_LAYERS[case]
    torch.manual_seed(0)
    tower = TOWERS[kind]().eval()
    if kind == "conv":
        nn.init.normal_(tower[1].out.weight)
    parent, _, own = name.rpartition(".")
    setattr(tower.get_submodule(parent), own, replace(tower.get_submodule(name)))
    maps = torch.randn(3, CHANNELS, SIZE, SIZE).contiguous(memory_format=memory_format)
    by_modules = nn.Sequential.forward(copy.deepcopy(tower).plain(), maps)
    torch.testing.assert_close(tower(maps), by_modules, rtol=1e-4, atol=1e-5)
    assert not tower.can_skip(maps)


@torch.no_grad()
def test_a_forward_of_others_is_called(tower, maps):
    layer = next(layer for layer in tower.modules() if isinstance(layer, (nn.Conv2d, nn.Linear)))
    expected, forward, called = tower(maps), layer.forward, []
    layer.forward = lambda x: called.append(0) or forward(x)
    torch.testing.assert_close(tower(maps), expected, rtol=1e-9, atol=1e-9)
    assert called


@torch.no_grad()
@pytest.mark.parametrize("number", [0, 1, 8, 19])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_an_fc_tower_in_float32(monkeypatch, number, memory_format):
    monkeypatch.setattr(onednn, "LINEAR_ROWS", 8)
    monkeypatch.setattr(onednn, "LINEAR_COLUMNS", 96)
    tower = TOWERS["fc"]().eval()
    x = torch.randn(number, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    x = x.contiguous(memory_format=memory_format)
    exact, plain = nn.Sequential.forward(copy.deepcopy(tower).double(), x.double()), nn.Sequential.forward(tower, x)
    found = tower(x)
    assert_as_exact(found, plain, exact)
    assert found.equal(tower(x)) and x.equal(x.clone())
    tower[1].weight.mul_(2)  # packed again
    torch.testing.assert_close(tower(x), nn.Sequential.forward(tower, x))
    x[:1] = torch.nan
    assert tower(x)[:1].isnan().all() and tower(x)[1:].isfinite().all()


@torch.no_grad()
@pytest.mark.skipif(not onednn.is_available(), reason="this PyTorch has no oneDNN")
def test_an_fc_tower_packs_its_weights_once_for_a_number_of_threads(monkeypatch):
    packed, pack = [], onednn.pack_linear
    monkeypatch.setattr(onednn, "pack_linear", lambda *weights: packed.append(1) or pack(*weights))
    tower, x = TOWERS["fc"]().eval(), torch.randn(3, CHANNELS, SIZE, SIZE)
    threads = torch.get_num_threads()
    try:
        for wanted, number in ((1, 2), (1, 2), (2, 4), (2, 4)):
            torch.set_num_threads(wanted)
            tower(x)
            assert len(packed) == number
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::FutureWarning")  # tracing is deprecated
def test_an_fc_tower_steps_aside_where_more_is_wanted_than_its_result(monkeypatch):
    monkeypatch.setattr(onednn, "linear", None)
    tower, x = TOWERS["fc"]().eval(), torch.randn(3, CHANNELS, SIZE, SIZE)

    def by_layers(x):
        return nn.Sequential.forward(tower, x)

    expected = by_layers(x)
    torch.testing.assert_close(torch.func.jvp(tower, (x,), (x,)), torch.func.jvp(by_layers, (x,), (x,)))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        tangents = [forward_ad.unpack_dual(run(dual)).tangent for run in (tower, by_layers)]
    torch.testing.assert_close(*tangents)
    torch.testing.assert_close(torch.jit.trace(tower, x, check_trace=False)(x), expected)
    with FlopCounterMode(display=False) as counter:
        tower(x)
    assert counter.get_total_flops() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert tower(x).dtype == torch.bfloat16
    monkeypatch.setattr(onednn, "is_available", lambda dtype: False)
    torch.testing.assert_close(tower(x), expected)
    with torch.inference_mode():
        made = TOWERS["fc"]().eval()
        made(x.contiguous(memory_format=torch.channels_last))


@torch.no_grad()
def test_a_conv_tower_holds_what_its_blocks_hold(maps):
    tower = TOWERS["conv"]()
    tower.double().eval()[0].residual[1].train()  # one norm in training: blocks run one by one, and fold by themselves
    block = next(block for block in tower.blocks if isinstance(block, NonLocalBlock))
    tower[0].residual[1].track_running_stats = False
    tower(maps)
    assert block.held_tensors() and len(tower.held_tensors()) == len(block.held_tensors())
