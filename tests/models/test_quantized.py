"""Heads in 8 bits: near float, equal to the emulation, and otherwise the same model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from doublehead.config import HeadConfig, NonLocalConfig
from doublehead.models.conv_tower import ConvTower
from doublehead.models.detector import Detector, build_detector
from doublehead.models.layered import Layered
from doublehead.models.observing import Histogram
from doublehead.models.products import FloatProduct, Int8Product, ScaledMaps
from doublehead.models.quantized import int8_layers, int8_support, layers_in_int8, observe, use_float, use_int8
from doublehead.models.towers import FCTower
from doublehead.ops import onednn
from doublehead.ops.int8 import grid_of
from tests.support.tiny_detectors import batch, lively, tiny

pytestmark = pytest.mark.skipif(int8_support().level == "none", reason=int8_support().reason)

NON_LOCAL = NonLocalConfig(enabled=True, groups=2)
CONFIGS = {
    "non_local": HeadConfig(conv_dim=32, conv_blocks=5, non_local=NON_LOCAL),
    "no_relu_after": HeadConfig(conv_dim=32, conv_blocks=3, non_local=NonLocalConfig(enabled=True, relu_after=False)),
    "softmax": HeadConfig(
        conv_dim=32, conv_blocks=3, non_local=NonLocalConfig(enabled=True, pairwise="embedded_gaussian")
    ),
    "bottlenecks": HeadConfig(conv_dim=32, conv_blocks=3, non_local=NonLocalConfig(enabled=False)),
    "shortcut_relu": HeadConfig(
        conv_dim=32, conv_blocks=2, shortcut_relu=True, non_local=NonLocalConfig(enabled=False)
    ),
    "fc": None,
}


def tower_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = CONFIGS[name]
    tower = FCTower(8, 7, 16) if config is None else ConvTower(8, config)
    with torch.no_grad():
        for module in tower.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.7, 1.4)
            elif isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return tower.eval()


def inputs(number: int = 40) -> torch.Tensor:
    x = torch.randn(number, 8, 7, 7, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def scales_of(tower, x) -> dict[str, float]:
    with observe(tower) as observation, torch.inference_mode():
        tower(x)
    return observation.scales()


@pytest.fixture(params=CONFIGS)
def quantized(request):
    """A tower in 8 bits, an input and the result of float."""
    tower, x = tower_of(request.param), inputs()
    with torch.inference_mode():
        expected = tower(x)
        use_int8(tower, scales_of(tower, x))
        yield tower, x, expected


def test_close_to_float(quantized):
    tower, x, expected = quantized
    error = (tower(x) - expected).norm() / expected.norm()
    assert 0 < error < 0.03
    use_float(tower)
    assert tower(x).equal(expected)


def test_equal_to_the_emulation(quantized):
    tower, x, _ = quantized
    result, layered = tower(x), tower.layered
    tower.layered = Layered(layered.scales, layered.bits, emulated=True)
    # Where floats lie in between, their last digit decides ties.
    assert (tower(x) - result).norm() < 1e-3 * result.norm()
    assert tower(x[:0]).shape == (0, result.shape[1])


def test_eight_bits_are_nearer_to_float_than_seven(quantized):
    tower, x, expected = quantized
    scales = {name: scale for name, scale in tower.layered.scales.items()}
    errors = []
    for bits in (8, 7):
        use_int8(tower, scales, bits=bits)
        errors.append(float((tower(x) - expected).norm()))
    assert errors[0] < errors[1]
    assert tower.layered.emulated is False


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_left_out_run_in_float(name):
    tower, x = tower_of(name), inputs()
    layers = int8_layers(tower)
    with torch.inference_mode():
        expected, scales = tower(x), scales_of(tower, x)
        use_int8(tower, scales)
        all_error = (tower(x) - expected).norm()
        for kept in layers:
            use_int8(tower, scales, leave_out=set(layers) - {kept})
            assert layers_in_int8(tower) == [kept]
            assert 0 < (tower(x) - expected).norm() < all_error * 1.5
        tower.layered = Layered({})  # nothing in 8 bits: layer by layer in float
        torch.testing.assert_close(tower(x), expected, rtol=1e-4, atol=1e-5)


def test_only_the_first_rois_are_computed():
    tower, x = tower_of("non_local"), inputs()
    x[35:] = float("nan")
    with torch.inference_mode():
        use_int8(tower, scales_of(tower, x[:35]))
        expected = tower(x[:35])
        for count in (0, 1, 33, 35):
            result = tower(x, torch.tensor(count))
            torch.testing.assert_close(result[:count], expected[:count])
            assert (result[count:] == 0).all()


def test_attention_of_very_different_rois():
    """The attention's result is cubic in its input: small RoIs keep their digits beside large ones."""
    tower, x = tower_of("non_local"), inputs()
    x *= torch.logspace(-1, 1, len(x)).view(-1, 1, 1, 1)
    with torch.inference_mode():
        expected, scales = tower(x), scales_of(tower, x)
        use_int8(tower, {name: scale for name, scale in scales.items() if name.endswith(".out")})
        assert ((tower(x) - expected).norm(dim=1) < 0.1 * expected.norm(dim=1)).all()


def test_a_map_of_zeros_adds_the_bias():
    weight, bias = torch.randn(4, 3, 1, 1), torch.randn(4)
    product = ScaledMaps(Int8Product(weight, torch.zeros(4), grid_of(0.5, True, 7), added=False), bias)
    to = torch.zeros(2, 4, 2, 2).contiguous(memory_format=torch.channels_last)
    x = torch.zeros(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    assert product.add(to, x).equal(bias.view(-1, 1, 1).expand(2, 4, 2, 2))


@pytest.mark.parametrize("name", ["non_local", "fc"])
def test_what_is_not_finite_is_not_hidden(name):
    tower, x = tower_of(name), inputs()
    with torch.inference_mode():
        use_int8(tower, scales_of(tower, x))
        expected = tower(x)
        x[3, 1, 2, 2], x[35, 0, 0, 0] = float("nan"), float("-inf")
        result = tower(x)
    spoiled = torch.zeros(len(x), dtype=torch.bool).index_fill(0, torch.tensor([3, 35]), True)
    assert result[spoiled].isnan().all() and result[~spoiled].equal(expected[~spoiled])
    with torch.no_grad():
        next(tower.parameters()).flatten()[0] = float("nan")
        assert tower(x[:1]).isnan().any()


def test_the_same_twice_and_in_any_memory_layout(quantized):
    tower, x, _ = quantized
    result = tower(x)
    assert tower(x).equal(result) and tower(x.contiguous()).equal(result)


def test_copies_and_pickles_are_in_8_bits_too(quantized):
    tower, x, _ = quantized
    result, state = tower(x), tower.state_dict()
    for other in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert other(x).equal(result) and other.state_dict().keys() == state.keys()
        use_float(other)
    assert tower(x).equal(result)
    assert not any("layered" in name or "scale" in name for name in state)


def test_changed_weights_are_quantized_anew(quantized):
    tower, x, _ = quantized
    before = tower(x)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(0.5)
    assert not tower(x).equal(before)
    fresh = copy.deepcopy(tower)
    assert tower(x).equal(fresh(x))


def test_training_and_gradients_are_in_float():
    for name in ("non_local", "fc"):
        tower, x = tower_of(name), inputs(4)
        expected = tower(x)
        use_int8(tower, scales_of(tower, x))
        result = tower(x)  # with gradients
        torch.testing.assert_close(result, expected)
        result.sum().backward()
        trained = copy.deepcopy(tower).train()
        use_float(reference := copy.deepcopy(trained))
        with torch.no_grad():
            assert trained(x).equal(reference(x))
            assert not trained.eval()(x).equal(reference.eval()(x))  # in 8 bits again


def test_other_dtypes_and_tracing_are_in_float():
    for name in ("non_local", "fc"):
        tower, x = tower_of(name), inputs(4)
        with torch.inference_mode():
            use_int8(tower, scales_of(tower, x))
            wide = copy.deepcopy(tower).double()
            torch.testing.assert_close(wide(x.double()), plain(wide)(x.double()))
        with torch.no_grad():
            expected = plain(tower)(x)
            for traced in (torch.export.export(tower, (x,)).module(), torch.jit.trace(tower, x, check_trace=False)):
                torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)
            assert not tower(x).allclose(expected, rtol=1e-4, atol=1e-5)


def plain(tower):
    other = copy.deepcopy(tower)
    use_float(other)
    return other


def test_autocast_gives_its_dtype():
    for name in ("non_local", "fc"):
        tower, x = tower_of(name), inputs(4)
        with torch.inference_mode():
            expected = tower(x)
            scales = scales_of(tower, x)
            use_int8(tower, scales, leave_out=list(scales)[:1])
            with torch.autocast("cpu", torch.bfloat16):
                result = tower(x)
        assert result.dtype == torch.bfloat16
        assert (result - expected).norm() < 0.05 * expected.norm()


def test_a_block_of_another_type_is_left_alone():
    class Mine(nn.Identity):
        pass

    tower, x = tower_of("bottlenecks"), inputs(4)
    with torch.inference_mode():
        use_int8(tower, scales_of(tower, x))
    tower[1] = Mine()
    assert int8_layers(tower) == [] and layers_in_int8(tower) == []


def detector_of(kind: str) -> Detector:
    torch.manual_seed(0)
    return lively(build_detector(tiny(kind), 4).detector)


def test_a_detector_in_8_bits():
    detector, images = detector_of("double_head_ext"), batch()
    layers = int8_layers(detector)
    assert layers[:2] == ["heads.fc.tower.1", "heads.fc.tower.3"]
    assert layers[2:5] == [f"heads.conv.tower.0.{name}" for name in ("residual.0", "residual.3", "shortcut.0")]
    assert layers[5:7] == ["heads.conv.tower.1.qkv", "heads.conv.tower.1.out"]
    with torch.inference_mode():
        expected = detector(images)
        with observe(detector) as observation:
            assert layers_in_int8(detector) == []
            observed = detector(images)
        torch.testing.assert_close(observed.scores, expected.scores, rtol=1e-3, atol=1e-4)
        scales = observation.scales()
        assert list(scales) == layers
        use_int8(detector, scales, leave_out=layers[1:2])
        assert layers_in_int8(detector) == [name for name in layers if name != layers[1]]
        result = detector(images)
        assert not result.scores.equal(expected.scores)
        assert (result.scores - expected.scores).abs().mean() < 0.05
        with observe(detector) as observation:
            detector(images)
        assert observation.scales() == scales and detector(images).scores.equal(result.scores)


def test_the_exact_skip_works_in_8_bits():
    detector, images = detector_of("double_head"), batch()
    nn.init.normal_(detector.heads["fc"].classifier.weight, std=1.5)
    with torch.inference_mode():
        with observe(detector) as observation:
            threshold = 0.8 * detector(images).scores[:, 0].min().item()
        use_int8(detector, observation.scales())
        results = []
        for skip in (True, False):
            detector.readout = detector.readout.replace(skip=skip, score_threshold=threshold)
            results.append(detector(images))
    skipped, everything = results
    assert (skipped.box_rois < everything.box_rois).all() and skipped.count.min() > 0
    for name in ("boxes", "scores", "labels", "count"):
        torch.testing.assert_close(getattr(skipped, name), getattr(everything, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": {"heads.fc.tower.9": 0.1}}, "scales: the model has no layer 'heads.fc.tower.9' that can run"),
        ({"leave_out": ["fc"]}, "leave_out: the model has no layer 'fc'.*; it has heads.fc.tower.1, "),
        ({"scales": {"heads.fc.tower.1": 0.0}}, "scales: expected a positive number for heads.fc.tower.1, got 0.0"),
        ({"scales": {"heads.fc.tower.1": float("nan")}}, "scales: expected a positive number"),
        ({"scales": {}}, "int8: no layer is left to run in 8 bits"),
        ({"leave_out": ["heads.fc.tower.1"]}, "int8: no layer is left to run in 8 bits"),
        ({"bits": 6}, "bits: expected 7 or 8, got 6"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change, message):
    detector = Detector(tiny("double_head"), 4)
    with pytest.raises(ValueError, match=message):
        use_int8(detector, **({"scales": {"heads.fc.tower.1": 0.1}} | change))
    assert layers_in_int8(detector) == []


def test_what_cannot_be_observed_is_said():
    tower, x = tower_of("fc"), inputs(2)
    with pytest.raises(ValueError, match="training mode"), observe(tower.train()):
        pass
    with pytest.raises(ValueError, match="has no layer that can run in 8 bits"), observe(nn.Linear(2, 2)):
        pass
    tower.eval()
    with observe(tower) as observation, pytest.raises(ValueError, match="no RoI reached a layer"):
        observation.scales()
    for value, message in (
        (0.0, "the inputs of 1 were all zero"),
        (float("inf"), "the inputs of 1 are not all finite"),
    ):
        with torch.no_grad(), observe(tower) as observation:
            tower(torch.full_like(x, value))
        with pytest.raises(ValueError, match=message):
            observation.scales()
    assert tower.layered is None


def test_a_machine_without_products_says_so(monkeypatch):
    from doublehead.models import quantized
    from doublehead.ops.int8 import Support

    monkeypatch.setattr(quantized, "int8_support", lambda: Support("none", "no oneDNN"))
    with pytest.raises(RuntimeError, match="int8: not on this machine: no oneDNN"):
        use_int8(tower_of("fc"), {"1": 0.1})


def test_scales_clip_rare_outliers():
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    whole, parts = Histogram(), Histogram()
    whole.add(values)
    for part in values.sort().values.split(7_000):  # its range grows again and again
        parts.add(part)
    assert parts.scale(True) == pytest.approx(whole.scale(True), rel=0.05)
    assert whole.scale(True) * 127.5 == pytest.approx(float(values.abs().max()), rel=0.15)
    scale = whole.scale(True)
    whole.add(torch.cat((torch.zeros(10_000_000), values[:1])))  # 0 is exact in every grid
    assert whole.scale(True) == pytest.approx(scale, rel=1e-3)
    whole.counts *= 100
    whole.add(torch.full((3,), 100.0))
    assert whole.scale(True) * 127.5 < 30


@torch.inference_mode()
def test_layers_in_float_are_packed_for_the_size_of_their_input(monkeypatch):
    """Packed for another size or number of threads, oneDNN may lay the weights out anew at every call."""
    if not onednn.is_available(torch.float32):
        pytest.skip("this build of PyTorch lacks oneDNN's convolutions")
    given, threads = [], [1]
    original = onednn.pack

    def pack(weight, stride=(1, 1), padding=(0, 0), size=None):
        given.append((list(padding), tuple(size), threads[0]))
        return original(weight, stride, padding, size)

    monkeypatch.setattr(onednn, "pack", pack)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    product = FloatProduct(torch.randn(6, 8, 3, 3), torch.randn(6), torch.float32)
    assert given == []
    x = inputs()
    for number in (16, 16, 8, 16, 5, 16):  # 5: in place of 8, which was used longest ago
        product(x[:number])
    assert given == [([1, 1], (number, 8, 7, 7), 1) for number in (16, 8, 5)]
    threads[0] = 2
    product(x[:16])
    assert given[3:] == [([1, 1], (16, 8, 7, 7), 2)]
    weight, to = torch.randn(6, 8, 1, 1), torch.randn(16, 6, 7, 7).contiguous(memory_format=torch.channels_last)
    expected = torch.nn.functional.conv2d(x[:16], weight) + to
    torch.testing.assert_close(FloatProduct(weight, torch.zeros(6), torch.float32).add(to, x[:16]), expected)
    assert given[4:] == [([0, 0], (16, 8, 7, 7), 2)]
