"""The operators that older exported programs hold: they forward to today's, with the same results to the last bit."""

import pytest
import torch

from doublehead.exporting.onnx_operators import decompositions
from doublehead.ops import multiscale_roi_align
from tests.support.roi_align_calls import make_pyramid, pool_and_differentiate, pyramid_rois

OLD = torch.ops.doublehead.multiscale_roi_align.default
OLD_BACKWARD = torch.ops.doublehead.multiscale_roi_align_backward.default
NEW_BACKWARD = torch.ops.doublehead.pyramid_roi_align_backward.default
RULES = ["torchvision", "detectron2", "mmdet", "maskrcnn_benchmark"]  # by their numbers
POOLING = [0.5, 0.25], [1.0, 1.3], [3, 5], 2, False, 20.0, 3
SIDES = torch.tensor([10 - 3e-6, 10 - 6e-6, 10 - 12e-6])  # next to the border of two levels: each rule has its own
BORDER = torch.stack([SIDES * 0, SIDES * 0, SIDES * 0, SIDES, SIDES], 1)
rules = pytest.mark.parametrize("rule", range(4), ids=RULES)

# As programs hold them: the names of the arguments too.
SCHEMAS = [
    "doublehead::multiscale_roi_align(Tensor[] features, Tensor rois, float[] spatial_scales, float[] box_scales, "
    "int[] output_size, int sampling_ratio, bool aligned, float canonical_size, int canonical_level, int level_rule) "
    "-> Tensor[]",
    "doublehead::multiscale_roi_align_backward(Tensor[] grads, Tensor rois, SymInt[] feature_sizes, "
    "bool channels_last, float[] spatial_scales, float[] box_scales, int[] output_size, int sampling_ratio, "
    "bool aligned, float canonical_size, int canonical_level, int level_rule) -> Tensor[]",
]


def today(features, rois, rule):
    return multiscale_roi_align(
        features, rois, (3, 5), spatial_scales=(0.5, 0.25), box_scales=(1.0, 1.3), canonical_size=20,
        canonical_level=3, level_rule=RULES[rule],
    )  # fmt: skip


class OldProgram(torch.nn.Module):
    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def forward(self, fine, coarse, rois):
        return OLD([fine, coarse], rois, *POOLING, self.rule)


def test_their_schemas_are_what_they_were():
    assert [str(operator._schema) for operator in (OLD, OLD_BACKWARD)] == SCHEMAS


@rules
def test_output_and_gradient(rule):
    features, rois = make_pyramid(), torch.cat([pyramid_rois(), BORDER])
    old = pool_and_differentiate(lambda features, rois: OLD(features, rois, *POOLING, rule), features, rois)
    new = pool_and_differentiate(lambda features, rois: today(features, rois, rule), features, rois)
    assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    others = [today(features, rois, other)[0] for other in range(4) if other != rule]
    assert not any(torch.equal(old[0], other) for other in others)


def test_backward():
    grads, rois, sizes = [torch.randn(4, 18, 3, 5) for _ in range(2)], pyramid_rois(), [2, 18, 24, 20, 12, 10]
    old = OLD_BACKWARD(grads, rois, sizes, False, *POOLING, 3)
    new = NEW_BACKWARD(grads, rois, sizes, False, *POOLING, 1e-6, 1, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_opcheck_and_autocast():
    arguments = make_pyramid(requires_grad=True), pyramid_rois(), *POOLING, 2
    assert set(torch.library.opcheck(OLD, arguments).values()) == {"SUCCESS"}
    expected = OLD(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(OLD(*arguments), expected, strict=True))


def test_a_program_is_saved_loaded_and_decomposed_for_onnx(tmp_path):
    arguments = *make_pyramid(), pyramid_rois()
    program = torch.export.export(OldProgram(1), arguments)
    assert "doublehead.multiscale_roi_align" in str(program.graph)  # it stays: such programs are what is tested
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    for actual, expected in zip(loaded.module()(*arguments), today(arguments[:2], arguments[2], 1), strict=True):
        assert torch.equal(actual, expected)
    assert "doublehead.multiscale" not in str(loaded.run_decompositions(decompositions(2)).graph)
