"""`analyze balance-weights --heads`: Figure 6 from the record of heads that were trained alone."""

import csv
import json
from statistics import fmean, stdev

import pytest
from PIL import Image

from doublehead.analysis import balance_results
from tests.support.analysis_detector import analyze

FIELDS = "model.loss.l_fc", "model.loss.l_conv"
AP = {"fused": 0.45, "split": 0.44, "fc": 0.42, "conv": 0.3}


def variant(l_fc, l_conv):
    return f"{FIELDS[0]}={l_fc},{FIELDS[1]}={l_conv}", dict(zip(FIELDS, (l_fc, l_conv), strict=True))


def result(name, readout, seed, ap, **more):
    one = {"variant": name, "kind": "double_head_ext", "readout": readout, "fusion": "complementary", "seed": seed}
    return one | {"step": 40, "AP": ap, "AP50": 2 * ap, "AP75": None if readout == "conv" else ap} | more


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Three seeds of two pairs of weights, of which one does not train the conv-head's classes, and other things."""
    full, part = variant(0.7, 0.8), variant(0.7, 1)
    results = [result(full[0], readout, seed, ap + 0.01 * seed**2) for seed in (0, 1, 2) for readout, ap in AP.items()]
    results += [result(part[0], readout, seed, 0.4 + 0.02 * seed) for seed in (0, 1, 2) for readout in ("split", "fc")]
    results += [
        result(full[0], "fused", 0, 0.9, step=20), result(full[0], "fused", 0, 0.9, fusion="max"),
        result(full[0], "fused", 0, 0.9, kind="fc"), result("base", "fused", 0, 0.9), result("wide", "fused", 0, 0.9),
    ]  # fmt: skip
    content = {
        "format": "doublehead heads 1", "commit": "abc1234", "steps": 40, "results": results,
        "variants": {"base": {}, "wide": {FIELDS[0]: 0.5, FIELDS[1]: 0.5, "model.head.conv_dim": 256}}
        | dict([full, part]),
    }  # fmt: skip
    path = tmp_path_factory.mktemp("heads") / "heads.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def drawn(record):
    """The folder of the results; they are drawn once."""
    assert draw(record, record.parent / "out") == 0
    return record.parent / "out"


def draw(record, out):
    return analyze("balance-weights", "--heads", record, "--out", out)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_means_and_errors_over_seeds(drawn):
    rows = {(row["l_fc"], row["l_conv"], row["readout"]): row for row in table(drawn / "balance-weights.csv")}
    assert len(rows) == 8
    aps = [0.45, 0.46, 0.49]
    fused = rows["0.7", "0.8", "fused"]
    assert float(fused["AP"]) == pytest.approx(fmean(aps)) and float(fused["AP50"]) == pytest.approx(2 * fmean(aps))
    assert float(fused["AP se"]) == pytest.approx(stdev(aps) / 3**0.5) and fused["seeds"] == "3"
    assert rows["0.7", "0.8", "conv"]["AP75"] == "" != rows["0.7", "0.8", "conv"]["AP"]
    assert [rows["0.7", "1.0", "fused"][name] for name in ("AP", "AP se", "seeds")] == ["", "", "0"]
    assert Image.open(drawn / "balance-weights.png").size[0] > 500


def test_differences_of_readouts_are_taken_seed_by_seed(drawn):
    rows = table(drawn / "balance-weights-differences.csv")
    found = {(row["l_conv"], row["readout"], row["minus"]): row for row in rows}
    one = found["0.8", "split", "fc"]
    assert float(one["AP difference"]) == pytest.approx(0.02) and float(one["AP se"]) == pytest.approx(0, abs=1e-12)
    assert found["1.0", "fused", "split"]["seeds"] == "0" and found["1.0", "fused", "split"]["AP difference"] == ""


def test_the_figures_record_names_the_heads(record, drawn):
    found = json.loads((drawn / "balance-weights.json").read_text())
    assert found["heads"]["record"] == str(record) and found["heads"]["commit"] == "abc1234"
    assert found["heads"]["steps"] == 40 and found["figure"] == "balance-weights" and "machine" in found
    assert found["tables"]["balance-weights"]["rows"][0][:3] == [0.7, 0.8, "fused"]


def test_untrained_readouts_are_hatched(record, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(balance_results, "draw_grid", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(balance_results, "save_figure", lambda *_: None)
    assert draw(record, tmp_path / "out") == 0
    assert "fused  best AP 46.7 at l_fc 0.7, l_conv 0.8; 1 runs" in capsys.readouterr().out
    _, untrained, name, errors = seen[0]
    assert untrained == {"fused": {(0.7, 1.0)}, "conv": {(0.7, 1.0)}, "split": set(), "fc": set()}
    assert name == "heads alone, 3 seeds" and errors["split"][0.7, 1.0] == pytest.approx(0.02 / 3**0.5)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot be read: No such file"),
        ("{", "not a record of `doublehead analyze heads`"),
        ("[]", "not a record of `doublehead analyze heads`"),
        ('{"format": "doublehead heads 9"}', "its format is 'doublehead heads 9'"),
        ('{"format": "doublehead heads 1"}', "'variants'"),
        ('{"format": "doublehead heads 1", "steps": 1, "variants": {"base": {}}, "results": []}', "no variant of"),
    ],
)
def test_what_is_no_such_record_is_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "heads.json"
    if text is not None:
        path.write_text(text)
    assert draw(path, tmp_path / "out") == 2
    shown = capsys.readouterr().err
    assert message in shown and len(shown.splitlines()) == 1 and not (tmp_path / "out").exists()
