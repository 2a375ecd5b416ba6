"""`NonLocalBlock`: its batch norm, its life as a module, and mmcv's weights in it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from doublehead.ops import BatchNorm, NonLocalBlock, non_local


def block(channels: int = 16, **options) -> NonLocalBlock:
    """With weights, and running statistics, that all matter."""
    torch.manual_seed(0)
    module = NonLocalBlock(channels, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    if module.norm is not None:
        nn.init.normal_(module.norm.running_mean)
        nn.init.uniform_(module.norm.running_var, 0.5, 2)
    return module


def maps(number: int = 3, channels: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, channels, 5, 4, generator=generator, dtype=torch.float64)


class SubclassedNorm(nn.BatchNorm2d):
    """Not `BatchNorm2d` itself, so the block calls it as a module: PyTorch's own batch norm."""


def with_module_norm(module: NonLocalBlock) -> NonLocalBlock:
    module = copy.deepcopy(module)
    module.norm.__class__ = SubclassedNorm
    return module


def test_names_of_the_state():
    names = [f"{layer}.{part}" for layer in ("theta", "phi", "g", "out", "norm") for part in ("weight", "bias")]
    assert list(block().state_dict()) == [
        *names, "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"
    ]  # fmt: skip
    assert list(block(norm=False).state_dict()) == names[:-2]


def test_a_fresh_block_adds_nothing():
    x = maps().float()
    for module in (NonLocalBlock(16), NonLocalBlock(16, norm=False), NonLocalBlock(16).eval()):
        assert torch.equal(module(x), x)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("relu_after", [False, True])
def test_batch_norm_is_pytorchs(momentum, relu_after):
    ours = block(relu_after=relu_after)
    ours.norm.momentum = momentum
    theirs = with_module_norm(ours)
    for step in range(3):
        x = maps() + step
        torch.testing.assert_close(ours(x), theirs(x))
        for name, tensor in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], tensor, msg=name)
    assert ours.norm.num_batches_tracked == 3
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_without_running_statistics(training):
    ours = block()
    ours.norm = nn.BatchNorm2d(16, track_running_stats=False, affine=False).double()
    ours.train(training)
    torch.testing.assert_close(ours(maps()), with_module_norm(ours)(maps()))


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_without_a_bias(training):
    ours = block().train(training)
    ours.norm.bias = None
    torch.testing.assert_close(ours(maps()), with_module_norm(ours)(maps()))


def test_a_frozen_batch_norm_in_training():
    ours = block()
    expected = copy.deepcopy(ours).eval()(maps())
    ours.norm.eval()
    torch.testing.assert_close(ours(maps()), expected)
    assert ours.norm.num_batches_tracked == 0


def test_sync_batch_norm():
    ours = block().eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(ours))
    assert type(converted.norm) is nn.SyncBatchNorm
    torch.testing.assert_close(converted(maps()), ours(maps()))


def test_averaged_and_copied():
    ours = block()
    averaged = AveragedModel(ours, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    averaged.update_parameters(ours)
    torch.testing.assert_close(averaged.eval()(maps()), ours.eval()(maps()))


# ---------------------------------------------------------------------------------------------
# Weights prepared once


def prepared_each_time(module: NonLocalBlock, x: torch.Tensor) -> torch.Tensor:
    """The block at inference from its plain weights, as `non_local` takes them."""
    qkv = module.theta, module.phi, module.g
    norm = module.norm
    return non_local(
        x,
        torch.cat([layer.weight.flatten(1) for layer in qkv]),
        torch.cat([layer.bias for layer in qkv]),
        module.out.weight.flatten(1),
        module.out.bias,
        norm=norm and BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps),
    )


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("dtype", "amp"),
    [(torch.float64, None), (torch.float64, torch.bfloat16), (torch.float32, None), (torch.float32, torch.bfloat16),
     (torch.float16, None), (torch.bfloat16, None)],
)  # fmt: skip
@torch.no_grad()
def test_prepared_weights_give_the_same_bits(dtype, amp, norm):
    ours, x = block(norm=norm).eval().to(dtype), maps().to(dtype)
    with torch.autocast("cpu", amp, enabled=amp is not None):
        expected = prepared_each_time(ours, x)
        for _ in range(2):
            assert ours(x).equal(expected) and expected.dtype == dtype


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_weights_are_prepared_once(monkeypatch, context):
    ours, prepared = block().eval(), []
    qkv = NonLocalBlock._qkv
    monkeypatch.setattr(NonLocalBlock, "_qkv", lambda self: prepared.append(True) or qkv(self))
    with context():
        for _ in range(3):
            ours(maps())
    assert len(prepared) == 1
    ours(maps())  # with gradients: not from prepared weights
    assert len(prepared) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.theta.weight.mul_(2),
        lambda module: module.out.bias.add_(1),
        lambda module: module.norm.running_var.mul_(2),
        lambda module: setattr(module.norm, "eps", 1.0),
        lambda module: module.load_state_dict({name: 2 * value for name, value in module.state_dict().items()}),
        lambda module: (module.g.weight.data.mul_(2), module.train(), module.eval()),
    ],
    ids=["weight", "bias", "statistics", "eps", "load", "mode switched"],
)
@torch.no_grad()
def test_changed_weights_are_prepared_anew(change):
    ours = block().eval()
    before = ours(maps())
    change(ours)
    assert not ours(maps()).allclose(before)
    assert ours(maps()).equal(prepared_each_time(ours, maps()))


@torch.no_grad()
def test_pickles_without_prepared_weights():
    ours = block().eval()
    ours(maps())
    state = ours.__dict__.copy()
    del state["_folded"]  # as older versions wrote it
    older = NonLocalBlock.__new__(NonLocalBlock)
    older.__setstate__(state)
    assert older(maps()).equal(ours(maps()))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, dict(pairwise="embedded_gaussian", groups=2, relu_after=True)])
def test_compiled(options, training):
    ours = block(**options).train(training)
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, dynamic=True, backend="aot_eager")
    for number in (3, 2, 5):
        x, same = maps(number).requires_grad_(), maps(number).requires_grad_()
        y, expected = compiled(x), ours(same)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, same.grad)
    for actual, expected in zip(compiled.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)
    for actual, expected in zip(compiled.buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("training", [False, True])
def test_exported(training):
    ours = block(relu_after=True).train(training)
    program = torch.export.export(
        copy.deepcopy(ours), (maps(),), dynamic_shapes={"x": {0: torch.export.Dim("rois", min=1)}}
    )
    for number in (3, 5):
        torch.testing.assert_close(program.module()(maps(number)), ours(maps(number)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(channels=17), "channels must be even"),
        (dict(channels=16, groups=3), "groups must be at least 1 and divide the inner width 8, got 3"),
        (dict(channels=16, inner=9, groups=2), "divide the inner width 9"),
        (dict(channels=16, pairwise="gaussian"), "pairwise must be one of dot_product, embedded_gaussian"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        NonLocalBlock(**arguments)


# ---------------------------------------------------------------------------------------------
# mmcv's weights


def mmcv_weights(channels: int, inner: int, norm: bool) -> dict[str, torch.Tensor]:
    """The state of an mmcv `NonLocal2d`; its last convolution has a bias only where no norm follows."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    state = {}
    for name in ("g", "theta", "phi"):
        state |= {f"{name}.conv.weight": normal(inner, channels, 1, 1), f"{name}.conv.bias": normal(inner)}
    state["conv_out.conv.weight"] = normal(channels, inner, 1, 1)
    if not norm:
        return state | {"conv_out.conv.bias": normal(channels)}
    state |= {f"conv_out.bn.{name}": normal(channels) for name in ("weight", "bias", "running_mean")}
    counted = torch.tensor(7)
    return state | {"conv_out.bn.running_var": normal(channels).square(), "conv_out.bn.num_batches_tracked": counted}


def mmcv_forward(state: dict[str, torch.Tensor], x: torch.Tensor, mode: str, use_scale: bool) -> torch.Tensor:
    """What mmcv computes at inference, told again: one map at a time."""
    maps = []
    for one in x:
        cells = one.flatten(1)  # [C, H * W]
        theta, phi, g = (
            state[f"{name}.conv.weight"][:, :, 0, 0] @ cells + state[f"{name}.conv.bias"][:, None]
            for name in ("theta", "phi", "g")
        )
        pairs = torch.einsum("dq,dk->qk", theta, phi)
        if mode == "dot_product":
            pairs = pairs / cells.shape[1]
        else:
            pairs = (pairs * len(theta) ** -0.5 if use_scale else pairs).exp()
            pairs = pairs / pairs.sum(1, keepdim=True)
        y = state["conv_out.conv.weight"][:, :, 0, 0] @ torch.einsum("qk,dk->dq", pairs, g)
        if "conv_out.conv.bias" in state:
            y = y + state["conv_out.conv.bias"][:, None]
        else:
            weight, bias, mean, variance = (
                state[f"conv_out.bn.{name}"][:, None] for name in ("weight", "bias", "running_mean", "running_var")
            )
            y = (y - mean) / (variance + 1e-5).sqrt() * weight + bias
        maps.append(one + y.view_as(one))
    return torch.stack(maps)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("mode", "use_scale"), [("dot_product", True), ("embedded_gaussian", True),
                                                 ("embedded_gaussian", False)])  # fmt: skip
@pytest.mark.parametrize("inner", [16, 8, 4])
def test_mmcv_weights_give_mmcvs_outputs(inner, mode, use_scale, norm):
    state = mmcv_weights(16, inner, norm)
    ours = NonLocalBlock.from_mmcv(state, mode=mode, use_scale=use_scale).eval()
    torch.testing.assert_close(ours(maps()), mmcv_forward(state, maps(), mode, use_scale))
    if norm:
        assert ours.norm.num_batches_tracked == 7 and not ours.out.bias.any()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, dict(mode="gaussian"), "mode: expected one of dot_product, embedded_gaussian, got 'gaussian'"),
        ({}, dict(mode="concatenation"), "mode: expected one of"),
        ({}, dict(sub_sample=True), "sub_sample: expected .*sub_sample=False"),
        ({"g.0.conv.weight": torch.zeros(1)}, {}, "sub_sample: expected .*sub_sample=False"),
        ({"concat_project.conv.weight": torch.zeros(1)}, {}, "state_dict: concat_project.conv.weight is no weight"),
        ({"conv_out.gn.weight": torch.zeros(1)}, {}, "state_dict: conv_out.gn.weight is no weight"),
        ({"theta.conv.weight": None}, {}, "state_dict: .* missing: theta.weight"),
        ({"conv_out.conv.bias": None}, {}, "state_dict: .* missing: out.bias"),
    ],
)
def test_errors_of_mmcv_weights(change, options, message):
    state = mmcv_weights(16, 8, norm=False) | change
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        NonLocalBlock.from_mmcv(state, **options)


@pytest.mark.parametrize("training", [False, True])
def test_hooks_on_its_layers_run(training):
    torch.manual_seed(0)
    block, called = NonLocalBlock(16, 8).double().train(training), []
    torch.nn.init.normal_(block.out.weight)
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64)
    expected = block(x)
    hook = block.theta.register_forward_hook(lambda module, *_: called.append(module))
    torch.testing.assert_close(block(x), expected)
    assert called == [block.theta]
    hook.remove()
    torch.testing.assert_close(block(x), expected)
    assert called == [block.theta]
