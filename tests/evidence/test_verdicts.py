"""Means, paired differences, and the rule that says what appears."""

import math

import pytest

from doublehead.analysis.heads import curves
from tests.support.evidence import of_heads, of_pearson, of_runs, script

paired, reading, findings = script("paired"), script("reading"), script("findings")


def test_a_difference_is_paired_by_seed():
    found = paired.paired({0: 3.0, 1: 5.0, 2: 8.0, 3: 9.0}, {2: 5.0, 1: 3.0, 0: 2.0})
    assert found.mean == pytest.approx(2.0)
    assert found.error == pytest.approx(1 / math.sqrt(3))  # 1, 2, 3; the unpaired one is larger
    assert found.size == pytest.approx(2.0)
    assert found.interval == pytest.approx((2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)))


def test_one_seed_has_no_error():
    found = paired.paired({0: 1.0}, {0: 0.5, 1: 9.0})
    assert found == (0.5, None, 1) and found.interval is None and found.size is None
    assert paired.verdict(found, 0.1) == "undecided"
    assert paired.paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(("mean", "paper", "expected"), [
    (4.4, 3.0, "appears"), (-4.4, 3.0, "turned round"), (4.2, 3.0, "undecided"), (-4.2, 3.0, "does not appear"),
    (-1.4, 3.0, "does not appear"), (-1.2, 3.0, "undecided"), (-4.2, None, "undecided"), (0.1, None, "undecided"),
])  # fmt: skip
def test_the_rule(mean, paper, expected):
    assert paired.verdict(paired.Effect(mean, 1.0, 3), paper) == expected  # the interval is 4.303 to each side


@pytest.mark.parametrize(("count", "reach"), [(2, 12.706), (3, 4.303), (10, 2.262), (40, 2.262)])
def test_students_t(count, reach):
    assert paired.student(count) == reach


def test_the_mean_crosses_where_its_sign_changes():
    record = of_heads()
    ours, theirs = (
        lambda step, kind=kind: curves.of_heads(record, kind, "AP", step=step) for kind in ("double_head", "fc")
    )
    assert curves.crossing(record, ours, theirs) == 2000  # half way from 1000 to 4000 RoIs in their logarithm
    assert curves.crossing(record, ours, ours) is None


def test_windows_are_averaged_over_the_bins_that_have_some():
    record = of_heads()
    assert curves.over_windows(record, "conv: both", "score", 0.0, 0.2) == pytest.approx(dict.fromkeys(range(3), 0.1))
    assert curves.over_windows(record, "conv: both", "score", 0.0, 0.05) == {}


def test_a_correlation_is_read_in_either_direction():
    forth, back = (reading.correlation(of_pearson(), *pair, "windows") for pair in (
        ("fc alone", "conv alone"), ("conv alone", "fc alone")))  # fmt: skip
    assert forth == (0.05, 0.01, 3) and back == (-0.05, 0.01, 3)
    assert reading.correlation(of_pearson(), "fc alone", "conv alone", "detections") is None


def test_the_differences_that_the_paper_has_are_its_tables():
    from doublehead.paper.rows import TABLES

    ap = {number: {row.label: row.published[0] for row in TABLES[number].rows} for number in (1, 3, 4)}
    named = {finding.claim: finding.tests[0].paper for finding in findings.FINDINGS}
    fpn, double, ext = (ap[4][name] for name in ("FPN baseline, R50", "Double-Head, R50", "Double-Head-Ext, R50"))
    one = ap[1]
    expected = {
        "Double-Head beats the single fc-head": double - fpn,
        "Double-Head beats two fc-heads": one["double-head, weighted"] - one["double-fc, weighted"],
        "Ext beats Double-Head": ext - double,
        "Ext beats the single fc-head": ext - fpn,
        "Two fc-heads beat one": one["double-fc, weighted"] - one["single fc"],
        "A single fc-head beats a single conv-head": one["single fc"] - one["single conv"],
        "One conv-head beats two": one["single conv"] - one["double-conv, weighted"],
        "The single fc-head beats the reversed double head": one["single fc"] - one["double-head-reverse, weighted"],
        "Fusing the classifiers helps": ap[3]["complementary"] - ap[3]["none (fc-head's)"],
        "Complementary fusion beats the average": ap[3]["complementary"] - ap[3]["average"],
    }
    assert {claim: named[claim] for claim in expected} == pytest.approx(expected)
    assert all(test.paper is None for finding in findings.FINDINGS for test in finding.tests if test.digits == 3)


def test_each_finding_finds_its_numbers():
    kinds = ("fc", "double_fc", "double_head", "double_head_ext")
    records = {
        "bccd": of_runs(kinds),
        "heads-shapes": of_heads(),
        "heads-narrow": of_heads(),
        "heads-longer": of_heads(),
        "pearson": of_pearson(),
    }
    missing = [
        test.words
        for finding in findings.FINDINGS
        for test in finding.tests
        if test.effect(records[test.record]) is None
    ]
    assert missing == ["Pearson, proposals", "Pearson, detections"]


def test_what_is_said_of_a_narrow_fc_head_comes_from_its_record():
    tests = [test for finding in findings.FINDINGS for test in finding.tests]
    assert {test.record for test in tests if "narrow" in test.words} == {"heads-narrow"}
    assert all("narrow" in test.words for test in tests if test.record == "heads-narrow")
