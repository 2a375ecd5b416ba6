"""Detections of any problem: the CPU path, Triton's and CUDA's kernels against the definition."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.support.detection_cases import OPTIONS, clear, tensors  # noqa: E402
from tests.support.detection_checks import EMULATED, FUSION_NAMES, INF, NAN, check  # noqa: E402


@st.composite
def problems(draw, most_rois):
    batch, rois, classes = draw(st.integers(0, 3)), draw(st.integers(0, most_rois)), draw(st.integers(1, 6))
    heads, scale = draw(st.integers(1, 2)), draw(st.sampled_from([0.5, 1.0, 2.0]))
    seed, crowd = draw(st.integers(0, 10_000)), draw(st.integers(1, 4))
    inputs = tensors(batch, rois, classes, seed, heads, scale, crowd)
    if rois > 1 and draw(st.booleans()):  # tied scores, of RoIs and of classes
        for item in inputs[0]:
            item[:, rois // 2 :] = item[:, : rois - rois // 2].clone()
            item[..., -1] = item[..., classes // 2]
    if rois > 1 and draw(st.booleans()):  # equal boxes
        inputs[2][:, 1::2] = inputs[2][:, :1]
        inputs[1][:, 1::2] = inputs[1][:, :1]
    options = OPTIONS | {
        "fusion": draw(st.sampled_from(FUSION_NAMES)),
        "score_threshold": draw(st.sampled_from([-1.0, 0.0, 1e-7, 0.05, 0.3, 0.6, 1.5])),
        "nms_iou": draw(st.sampled_from([0.0, 0.3, 0.5, 0.9])),
        "max_detections": draw(st.integers(0, 15)),
        "min_size": draw(st.sampled_from([0.0, 1e-2, 20.0])),
        "least_side": draw(st.sampled_from([0.0, 1.0, 15.0])),
    }
    bad = draw(st.sampled_from([None, NAN, INF, -INF]))
    if bad is not None and batch and rois:
        place = draw(st.integers(0, rois - 1))
        spoilt = draw(st.sampled_from([*inputs[0], inputs[1], inputs[2]]))
        spoilt[0, place].view(-1)[draw(st.integers(0, spoilt[0, place].numel() - 1))] = bad
    return inputs, options


hypothesis_settings = dict(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@settings(max_examples=150, **hypothesis_settings)
@given(problems(most_rois=12))
def test_cpu_equals_the_definition(problem):
    inputs, options = problem
    check(inputs, **options)


@settings(max_examples=40, **hypothesis_settings)
@given(problem=problems(most_rois=7))
def test_kernels_equal_the_definition(triton_kernels, poison, problem):
    inputs, options = problem
    assume(clear(inputs, options))
    check(inputs, triton_kernels, exact=False, **options)


@settings(max_examples=60, **hypothesis_settings)
@given(problem=problems(most_rois=12))
def test_emulated_cuda_kernels_equal_the_definition(problem):
    inputs, options = problem
    assume(clear(inputs, options))
    check(inputs, EMULATED, exact=False, **options)
