"""XML as other tools write it: its form, its encoding, sizes that say nothing; and names of pictures."""

from __future__ import annotations

import codecs

import pytest

from doublehead.data import DataError, build_dataset
from tests.support.data_samples import VocFolder

pytestmark = pytest.mark.filterwarnings("error::doublehead.data.DataWarning")

NEWT = VocFolder.entry("newt", (11, 21, 30, 25))
SIZE = "<size><width>40</width><height>30</height></size>"


@pytest.fixture
def voc(tmp_path):
    sample = VocFolder(tmp_path / "set")
    sample.write()
    return sample


def read(voc, content: str | bytes):
    """The validation split with `content` as the annotation of the image `two`."""
    voc.xml_file("two").write_bytes(content if isinstance(content, bytes) else content.encode())
    return build_dataset(voc.config(), "val")


# ---------------------------------------------------------------------- form

OTHER_FORMS = {
    "HTML": ("<html><body>404</body></html>", "its root is <html>; <annotation> is accepted"),
    "another root": (f"<Annotation>{SIZE}{NEWT}</Annotation>", "its root is <Annotation>"),
    "one more level": (f"<annotations><annotation>{NEWT}</annotation></annotations>",
                       "its root is <annotations>, with <annotation> inside"),
    "a group": (f"<annotation>{SIZE}<objects>{NEWT}</objects></annotation>", "<objects> stands in <annotation>"),
    "one more, inside": (f"<annotation>{SIZE}<x>{NEWT}</x></annotation>", "<object> stands in <x>"),
    "some in a group": (f"<annotation>{SIZE}{NEWT}<more>{NEWT}</more></annotation>", "<object> stands in <more>"),
    "an object in an object": (f"<annotation>{SIZE}{NEWT.replace('</part>', '</part>' + NEWT)}</annotation>",
                               "<object> stands in <object>"),
    "capitals": (f"<annotation>{SIZE}{NEWT.replace('object>', 'Object>')}</annotation>",
                 "<Object> stands in <annotation>"),
    "boxes without objects": (f"<annotation>{SIZE}<bndbox><xmin>1</xmin></bndbox></annotation>", "<bndbox> stands in"),
    "other elements": ("<annotation><task/><image id='0'/></annotation>", "its elements are <task>, <image>, none of"),
    "a group of another name": (f"<annotation>{SIZE}<targets><target><n>newt</n></target></targets></annotation>",
                                "it has no <object>, but <targets>, which is not VOC's, with content"),
    "attributes": (f"<annotation>{SIZE}<rect x='1' y='2' w='3' h='4'/></annotation>", "it has no <object>, but <rect>"),
    "text": ("<annotation>newt 1 2 3 4</annotation>", "it has no elements, but text: 'newt 1 2 3 4'"),
    "CVAT": ("<annotations><image id='0'><box label='newt'/></image></annotations>", "its root is <annotations>;"),
}  # fmt: skip


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_another_form_is_never_a_picture_without_objects(voc, form):
    content, said = OTHER_FORMS[form]
    with pytest.raises(DataError) as caught:
        read(voc, content)
    assert caught.value.reason == "not a VOC annotation" and said in str(caught.value)
    assert str(caught.value).startswith(f"{voc.xml_file('two')}: not a Pascal VOC annotation: ")


@pytest.mark.parametrize("content", [
    f'<annotation xmlns="http://example.org/voc">{SIZE}{NEWT}</annotation>',
    f'<v:annotation xmlns:v="urn:v">{(SIZE + NEWT).replace("</", "</v:").replace("<", "<v:").replace("<v:/v:", "</v:")}'
    "</v:annotation>",
    f"<annotation verified='yes'><folder/><!-- <object/> -->{SIZE}{NEWT}</annotation>",
    f'<?xml version="1.0"?>\n<!DOCTYPE annotation>\n<annotation>{SIZE}{NEWT}</annotation>',
])  # fmt: skip
def test_forms_that_are_clear_are_read(voc, content):
    data = read(voc, content)
    assert data[1][1]["boxes"].tolist() == [[10, 20, 30, 25]] and data.classes == ["frog", "newt"]


@pytest.mark.parametrize(
    "content",
    [
        "<annotation/>",
        f"<annotation>{SIZE}</annotation>",
        "<annotation><filename>x.jpg</filename><note>empty</note></annotation>",
    ],
)
def test_pictures_without_objects_are_still_pictures(voc, content):
    assert read(voc, content)[1][1]["boxes"].shape == (0, 4)


INCOMPLETE = {
    "empty": ("<object/>", "name '' is empty"),
    "no name": (NEWT.replace("<name>newt</name>", ""), "name '' is empty"),
    "no box": ("<object><name>newt</name><robndbox/></object>", "no bndbox, its elements are <name>, <robndbox>"),
    "no corner": (NEWT.replace("<ymax>25</ymax>", ""), "0 elements <ymax>, one is accepted"),
    "two boxes": (NEWT.replace("</object>", "<bndbox/></object>"), "2 elements <bndbox>, one is accepted"),
    "two names": (NEWT.replace("</object>", "<name>frog</name></object>"), "2 elements <name>, one is accepted"),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_objects_with_missing_or_repeated_elements(voc, case):
    content, said = INCOMPLETE[case]
    with pytest.raises(DataError) as caught:
        read(voc, VocFolder.xml(content))
    assert f"{voc.xml_file('two')}, object 1 of 1 (" in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize("number", ["1_1", "١١", "11,0", "0x0b", "11 px", ""])
def test_what_only_python_takes_for_a_number(voc, number):
    with pytest.raises(DataError, match="object 1 of 1.*is not a number"):
        read(voc, VocFolder.xml(NEWT.replace(">11<", f">{number}<")))
    for same in (" 11 ", "+11", "11.0", "1.1e1"):
        assert read(voc, VocFolder.xml(NEWT.replace(">11<", f">{same}<")))[1][1]["boxes"][0, 0] == 10


# ---------------------------------------------------------------------- size


@pytest.mark.parametrize("size", [
    "", "<size/>", "<size><depth>3</depth></size>", "<size><width>0</width><height>0</height></size>",
    "<size><width/><height/></size>", "<size><width> 40.0 </width><height>30.0</height></size>",
])  # fmt: skip
def test_sizes_that_say_nothing_or_have_a_point(voc, size):
    for split in ("train", "val"):
        voc.xml_file("two").write_text(VocFolder.xml(NEWT, size))
        assert build_dataset(voc.config(), split).image_sizes[1] == (30, 40)


@pytest.mark.parametrize("width, height", [(0, 30), (40, ""), ("", 30), (-40, -30), (40.5, 30), ("1e999", 30)])
def test_half_a_size_is_none(voc, width, height):
    with pytest.raises(DataError, match="two.xml, size: height, width are .*; positive integers are accepted"):
        read(voc, VocFolder.xml(NEWT, f"<size><width>{width}</width><height>{height}</height></size>"))


# ---------------------------------------------------------------------- encodings

ENCODINGS = {
    "utf-8": "青蛙", "utf-16": "青蛙", "utf-32": "青蛙", "iso-8859-1": "Frösche", "windows-1251": "лягушка",
    "gbk": "青蛙", "gb2312": "青蛙", "GB18030": "青蛙", "big5": "青蛙", "shift_jis": "カエル", "Shift-JIS": "カエル",
    "cp932": "①カエル", "euc-jp": "カエル", "euc-kr": "개구리",
}  # fmt: skip


@pytest.mark.parametrize("declared", ENCODINGS)
def test_declared_encodings(voc, declared):
    name = ENCODINGS[declared]
    text = VocFolder.xml(NEWT.replace("newt", name))
    assert name in read(voc, f'<?xml version="1.0" encoding="{declared}"?>\n{text}'.encode(declared)).classes


@pytest.mark.parametrize("declared, encoding, name", [
    ("", "utf-8", "青蛙"), ("", "utf-8-sig", "青蛙"), (' encoding="UTF-8"', "utf-8-sig", "青蛙"),
    ("", "utf-16", "青蛙"), ("", "utf-16-le", "青蛙"), (" encoding='gb2312'", "gbk", "繁體"),
    (' encoding="Shift_JIS"', "cp932", "①"),
    (' encoding="utf-8" standalone="no"', "utf-8", "青蛙"), (' encoding = "euc-kr"', "cp949", "똠방"),
])  # fmt: skip
def test_marks_and_what_is_commonly_meant(voc, declared, encoding, name):
    text = f'<?xml version="1.0"{declared}?>' + VocFolder.xml(NEWT.replace("newt", name))
    assert name in read(voc, text.encode(encoding)).classes


WRONG_ENCODINGS = {
    "not declared": ('<?xml version="1.0"?>\n', "gbk", "it declares no encoding, and is not in UTF-8 (line 2, byte "),
    "another": ('<?xml version="1.0" encoding="utf-8"?>\n', "gbk", "declares the encoding 'utf-8', but is not in it"),
    "UTF-16 declared": ('<?xml version="1.0" encoding="utf-16"?>', "utf-8", "the encoding 'utf-16', but is not"),
    "unknown": ('<?xml version="1.0" encoding="klingon"?>', "utf-8", "its declared encoding 'klingon' is not known"),
    "no text": ('<?xml version="1.0" encoding="base64"?>', "utf-8", "'base64' is not a text encoding"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_ENCODINGS)
def test_wrong_encodings_are_one_line(voc, case):
    declaration, encoding, said = WRONG_ENCODINGS[case]
    with pytest.raises(DataError) as caught:
        read(voc, (declaration + VocFolder.xml(NEWT.replace("newt", "青蛙"))).encode(encoding))
    assert caught.value.reason == "invalid XML" and said in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{voc.xml_file('two')}: invalid XML: ")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_not_expanded(voc, encoding):
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "ha"}">' for i in range(12))
    text = f"<!DOCTYPE annotation [{laughs}]><annotation><folder>&l11;</folder>{NEWT}</annotation>"
    with pytest.raises(DataError, match="it declares entities"):
        read(voc, text.encode(encoding))
    assert codecs.BOM_UTF16 in text.encode("utf-16")
