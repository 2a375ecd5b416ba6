"""Parameter counts, forms and starting weights of the heads."""

import itertools

import pytest
import torch
from torch import nn

from doublehead.config import HeadConfig, NonLocalConfig, RoIConfig
from doublehead.models.conv_tower import Bottleneck, ConvTower, WideningBlock, non_local_block
from doublehead.models.heads import Heads
from doublehead.models.readout import BRANCHES
from doublehead.models.towers import FCTower
from doublehead.ops import NonLocalBlock

M = 2**20


def weights(module: nn.Module) -> int:
    """Weights of convolutions and linear layers alone, as the paper counts."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear))


def conv_tower(blocks: int, non_local: bool) -> ConvTower:
    return ConvTower(256, HeadConfig(conv_blocks=blocks, non_local=NonLocalConfig(enabled=non_local)))


@pytest.mark.parametrize(
    ("module", "count"),
    [
        (lambda: WideningBlock(256, 1024), 1_114_112),
        (lambda: Bottleneck(1024), 1_114_112),
        (lambda: NonLocalBlock(1024, groups=4), 2_097_152),
        (lambda: FCTower(256, 7, 1024), 13_893_632),
    ],
)
def test_parameter_counts_of_parts(module, count):
    assert weights(module()) == count


@pytest.mark.parametrize("blocks", range(1, 8))
def test_parameter_counts_of_residual_towers(blocks):
    assert weights(conv_tower(blocks, non_local=False)) == blocks * 1.0625 * M


def test_the_inner_width_of_non_local_blocks_is_free():
    """theta, phi, g and out have dim x inner weights each; the other blocks stay as they are."""
    narrow = ConvTower(256, HeadConfig(non_local=NonLocalConfig(inner_dim=128)))
    assert weights(narrow) == 3 * 1.0625 * M + 2 * 4 * 1024 * 128
    explicit = ConvTower(256, HeadConfig(non_local=NonLocalConfig(inner_dim=512)))
    assert weights(explicit) == 7.1875 * M


@pytest.mark.parametrize(("blocks", "count"), [(1, 1.0625), (3, 4.125), (5, 7.1875), (7, 10.25)])
def test_parameter_counts_of_non_local_towers(blocks, count):
    assert weights(conv_tower(blocks, non_local=True)) == count * M


def test_a_non_local_block_stands_before_each_bottleneck():
    order = [type(layer) for layer in conv_tower(5, non_local=True)]
    assert order[:5] == [WideningBlock, NonLocalBlock, Bottleneck, NonLocalBlock, Bottleneck]


def test_every_convolution_of_the_residual_blocks_has_batch_norm():
    for block in (WideningBlock(16, 64), Bottleneck(64)):
        convs = [layer for layer in block.modules() if isinstance(layer, nn.Conv2d)]
        norms = [layer for layer in block.modules() if isinstance(layer, nn.BatchNorm2d)]
        assert len(convs) == len(norms)
        assert all(conv.bias is None for conv in convs)


def heads(kind: str, **changes) -> Heads:
    config = HeadConfig(kind=kind, fc_dim=8, conv_dim=16, conv_blocks=3, **changes)
    return Heads(config, RoIConfig(fc_box_scale=1.0, conv_box_scale=1.3), channels=4, num_classes=5)


@pytest.mark.parametrize("kind", [kind for kind in BRANCHES if kind != "conv5"])  # that one: test_c4.py
def test_kinds_give_the_outputs_of_their_branches(kind):
    model = heads(kind)
    outputs = model({1.0: torch.randn(6, 4, 7, 7), 1.3: torch.randn(6, 4, 7, 7)})
    assert list(outputs) == list(BRANCHES[kind])
    for name, branch in BRANCHES[kind].items():
        logits, deltas = outputs[name]
        assert (logits is not None) == branch.classifies
        assert (deltas is not None) == branch.regresses
        assert logits is None or logits.shape == (6, 5)
        assert deltas is None or deltas.shape == (6, 5, 4)
        assert isinstance(model[name].tower, FCTower if branch.tower == "fc" else ConvTower)
        assert model.box_scales[name] == (1.0 if branch.tower == "fc" else 1.3)


@pytest.mark.parametrize("kind", [kind for kind in BRANCHES if kind != "conv5"])
def test_class_agnostic_heads_give_every_class_one_box(kind):
    model = heads(kind, class_agnostic_boxes=True)
    outputs = model({1.0: torch.randn(6, 4, 7, 7), 1.3: torch.randn(6, 4, 7, 7)})
    for name, branch in BRANCHES[kind].items():
        if branch.regresses:
            assert model[name].regressor.weight.shape[0] == 4
            assert outputs[name].deltas.shape == (6, 5, 4)
            assert outputs[name].deltas.equal(outputs[name].deltas[:, :1].repeat(1, 5, 1))


def test_kinds_are_the_papers():
    tasks = {
        kind: sorted((b.tower, b.classifies, b.regresses) for b in branches.values())
        for kind, branches in BRANCHES.items()
    }
    assert tasks == {
        "fc": [("fc", True, True)],
        "conv": [("conv", True, True)],
        "double_fc": [("fc", False, True), ("fc", True, False)],
        "double_conv": [("conv", False, True), ("conv", True, False)],
        "double_head": [("conv", False, True), ("fc", True, False)],
        "double_head_reverse": [("conv", True, False), ("fc", False, True)],
        "double_head_ext": [("conv", True, True), ("fc", True, True)],
        "conv5": [("conv5", True, True)],
    }


def test_starting_weights():
    torch.manual_seed(0)
    model = Heads(HeadConfig(), RoIConfig(), channels=256, num_classes=81)
    bound = (3 / (256 * 49)) ** 0.5  # kaiming_uniform with a = 1
    first = model["fc"].tower[1]
    assert first.weight.abs().max() <= bound and first.weight.abs().max() > 0.99 * bound
    for head in model.values():
        assert head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert head.regressor.weight.std().item() == pytest.approx(0.001, rel=0.05)
        assert not head.classifier.bias.any() and not head.regressor.bias.any()
    assert not first.bias.any()
    for block in model["conv"].tower:
        if isinstance(block, NonLocalBlock):
            assert not block.out.weight.any() and not block.out.bias.any()


def test_convolutions_of_the_conv_head_start_as_the_releases():
    """All but the last of a non-local block are left to PyTorch: uniform within 1 / sqrt(fan in), biases too."""
    torch.manual_seed(0)
    tower = ConvTower(256, HeadConfig())
    convolutions = {name: layer for name, layer in tower.named_modules() if isinstance(layer, nn.Conv2d)}
    drawn = {name: layer for name, layer in convolutions.items() if not name.endswith(".out")}
    assert sum(name.endswith((".theta", ".phi", ".g")) for name in drawn) == 6 and len(convolutions) == len(drawn) + 2
    for name, layer in drawn.items():
        bound = layer.weight[0].numel() ** -0.5
        for parameter in filter(lambda parameter: parameter is not None, (layer.weight, layer.bias)):
            assert 0.98 * bound < parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
    for layer in tower.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all() and not layer.bias.any()


def plain_non_local(block: NonLocalBlock, x: torch.Tensor) -> torch.Tensor:
    """The block's formula, one RoI and one group at a time."""
    cells = x.shape[2] * x.shape[3]
    theta, phi, g = block.theta(x), block.phi(x), block.g(x)
    width = theta.shape[1] // block.groups
    mixed = torch.zeros_like(g)
    for roi, group in itertools.product(range(len(x)), range(block.groups)):
        part = slice(group * width, (group + 1) * width)
        t, p, v = (y[roi, part].reshape(width, cells) for y in (theta, phi, g))
        pairwise = t.T @ p  # row: the cell that looks; column: the cell looked at
        if block.pairwise == "dot_product":
            pairwise = pairwise / cells
        else:
            pairwise = torch.softmax(pairwise / (width**0.5 if block.scale else 1), dim=1)
        mixed[roi, part] = (v @ pairwise.T).reshape(width, *x.shape[2:])
    y = x + block.norm(block.out(mixed))
    return y.relu() if block.relu_after else y


@pytest.mark.parametrize(
    "config",
    [
        NonLocalConfig(),
        NonLocalConfig(pairwise="dot_product", groups=1, relu_after=False),
        NonLocalConfig(pairwise="embedded_gaussian", groups=1, relu_after=False),
        NonLocalConfig(pairwise="embedded_gaussian", groups=4, scale=True),
        NonLocalConfig(inner_dim=24),
        NonLocalConfig(inner_dim=40, pairwise="embedded_gaussian", groups=4, scale=True),
    ],
)
def test_non_local_forms(config):
    torch.manual_seed(0)
    block = non_local_block(32, config).double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(3, 32, 5, 7, dtype=torch.double)
    torch.testing.assert_close(block(x), plain_non_local(block, x))


def test_a_fresh_non_local_block_adds_nothing():
    x = torch.randn(2, 16, 7, 7)
    torch.testing.assert_close(NonLocalBlock(16)(x), x)


def test_relu_after_the_shortcut():
    torch.manual_seed(0)
    plain, switched = WideningBlock(4, 16).eval(), WideningBlock(4, 16, shortcut_relu=True).eval()
    switched.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(switched(x), (plain.residual(x) + plain.shortcut(x).relu()).relu())
    assert not torch.allclose(switched(x), plain(x))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(conv_blocks=0), "at least 1"),
        (dict(conv_blocks=4), "odd number"),
        (dict(kind="triple"), "head.kind"),
        (dict(conv_dim=18), "groups"),
        (dict(non_local=NonLocalConfig(groups=0)), "head.non_local.groups: expected at least 1, got 0"),
        (dict(non_local=NonLocalConfig(inner_dim=6)), "inner_dim: expected a positive multiple of groups, 4, got 6"),
        (dict(non_local=NonLocalConfig(inner_dim=0)), "inner_dim: expected a positive multiple of groups, 4, got 0"),
    ],
)
def test_bad_configurations_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        Heads(HeadConfig(**config), RoIConfig(), channels=4, num_classes=3)
