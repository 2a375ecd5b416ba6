"""The committed records say where they are from, and the docs say what they hold."""

import copy
import re

import pytest

from tests.support.evidence import script

tables, reading, charts = script("tables"), script("reading"), script("charts")
RECORDS = reading.load()


def test_there_are_records():
    assert {"implementation", "own-data"} <= RECORDS.keys()


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_says_where_it_is_from(name):
    assert reading.gaps(RECORDS[name]) == []
    text = (reading.RECORDS / f"{name}.json").read_text()
    assert not re.search(r"/(work|home|root|tmp)/", text)


@pytest.mark.parametrize("name", reading.ORIGIN)
def test_a_record_without_its_origin_is_found(name):
    record = copy.deepcopy(RECORDS["own-data"])
    record[name] = type(record[name])()
    missing = reading.gaps(record)
    assert (name in missing) if name != "seconds" else missing == []


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_a_page_holds_the_tables_of_the_records(page):
    text = page.read_text()
    assert text.count("<!-- table ") == len(tables.BLOCK.findall(text)) == text.count("<!-- end -->")
    assert tables.rewritten(text, RECORDS) == text


def test_a_number_that_was_edited_by_hand_is_found():
    pages = {page: page.read_text() for page in tables.PAGES}
    blocks = [(page, block) for page, text in pages.items() for block in tables.BLOCK.finditer(text)]
    assert blocks
    for page, block in blocks:
        text = pages[page]
        for number in re.finditer(r"\d+(?=\.\d)", block[4]):
            at = block.start(4) + number.start()
            edited = f"{text[:at]}9{text[at:]}"
            assert tables.rewritten(edited, RECORDS) == text


def test_the_charts_are_drawn_from_the_records():
    assert charts.outdated(tables.CHARTS, RECORDS) == []


def test_every_picture_is_in_the_page_and_there():
    page = (tables.ROOT / "docs" / "evidence.md").read_text()
    assert set(re.findall(r"<!-- table chart ([\w-]+) -->", page)) == charts.PICTURES.keys()
    for name in re.findall(r"\(evidence/([\w-]+)\.png\)", page):
        assert (tables.CHARTS / f"{name}.png").exists()
