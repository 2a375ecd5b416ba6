"""What Hypothesis draws for the tests of non-maximum suppression."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.support.nms_cases import THRESHOLDS, make_images


@st.composite
def images(draw):
    return make_images(lambda low, high: draw(st.integers(low, high)), lambda choices: draw(st.sampled_from(choices)))


thresholds = st.one_of(st.sampled_from(THRESHOLDS), st.floats(0.0, 1.0))
