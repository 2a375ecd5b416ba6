"""Reads Pascal VOC's XML: decodes it as declared, and checks its structure before anything is read from it.

A search for objects in the wrong place gives an empty list, and an image without objects is valid; so a file with
another structure has to be recognised here.
"""

from __future__ import annotations

import codecs
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from ..errors import DataError
from .paths import check_regular

MARKS = (
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"), (b"<\0", "utf-16-le"), (b"\0<", "utf-16-be"),
)  # fmt: skip
"""(first bytes of a file, its encoding); UTF-32's mark comes first because it begins with UTF-16's."""
DECLARED = re.compile(rb"""\s*<\?xml[^>]*?\bencoding\s*=\s*["']([A-Za-z][A-Za-z0-9._-]*)["']""")
SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949"}
"""Encoding -> Windows' extension of it, which is often declared under the encoding's name."""
VOC_CHILDREN = frozenset(("folder", "filename", "path", "source", "owner", "size", "segmented", "object"))
OBJECT_SIGNS = frozenset(("object", "objects", "obj", "item", "bndbox", "robndbox", "box", "bbox", "polygon", "points"))
"""Elements that hold objects in other structures; compared in lower case."""


def read_annotation(path: Path) -> ElementTree.Element:
    """The `<annotation>` element of a file, without name spaces; all its objects are its `<object>` children.

    Raises:
        DataError: the file does not exist, has another encoding than it declares, is invalid XML, declares entities
            (which may grow without bounds), or is not a VOC annotation.
    """
    check_regular(path, "annotation")
    try:
        text = _decode(path.read_bytes())
        if "<!ENTITY" in text:
            raise ValueError("it declares entities, which no annotation needs and which may grow without bounds")
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:  # ParseError names line and column
        raise DataError(f"{path}: invalid XML: {error}", "invalid XML") from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    wrong = _other_form(root)
    if wrong:
        raise DataError(f"{path}: not a Pascal VOC annotation: {wrong}", "not a VOC annotation")
    return root


def _decode(data: bytes) -> str:
    codec, otherwise = _encoding(data)
    for attempt in filter(None, (codec, SUPERSETS.get(codec))):
        try:
            return data.decode(attempt).removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            position = error.start
    line = data.count(b"\n", 0, position) + 1
    raise ValueError(f"{otherwise} (line {line}, byte {position})")


def _encoding(data: bytes) -> tuple[str, str]:
    """The encoding by a file's byte order mark or declaration, else UTF-8; and the message if it is wrong.

    expat itself supports no encoding with several bytes per character other than UTF-8 and UTF-16.
    """
    name = next((codec for mark, codec in MARKS if data.startswith(mark)), None)
    if name:
        return name, f"it begins as {name} does, but is not in it"
    found = DECLARED.match(data[:1000])
    if not found:
        return "utf-8", "it declares no encoding, and is not in UTF-8"
    said = found[1].decode("ascii")
    otherwise = f"it declares the encoding '{said}', but is not in it"
    try:
        name = codecs.lookup(said).name
    except LookupError:
        raise LookupError(f"its declared encoding '{said}' is not known") from None
    if name.startswith(("utf-16", "utf-32")):  # then the declaration could not have been read
        raise ValueError(otherwise)
    return name, otherwise


def _other_form(root: ElementTree.Element) -> str | None:
    """Why this is not a VOC annotation, or has objects where they would not be found; None: it is one."""
    if root.tag != "annotation":
        inside = root.find(".//annotation") is not None
        what = f"<{root.tag[:80]}>, with <annotation> inside" if inside else f"<{root.tag[:80]}>"
        return f"its root is {what}; <annotation> is accepted"
    objects = root.findall("object")
    own = {id(item) for item in objects}
    signs = OBJECT_SIGNS if not objects else {"object"}
    for parent in root.iter():
        for child in parent:
            if id(child) not in own and child.tag.lower() in signs:
                return (f"<{child.tag}> stands in <{parent.tag[:80]}>; objects are accepted as <object> directly in "
                        "<annotation>")  # fmt: skip
    children = [child.tag for child in root]
    if children and VOC_CHILDREN.isdisjoint(children):
        return f"its elements are <{'>, <'.join(tag[:40] for tag in dict.fromkeys(children[:8]))}>, none of them VOC's"
    foreign = next((child for child in root if child.tag not in VOC_CHILDREN and (len(child) or child.attrib)), None)
    if foreign is not None and not objects:  # its contents may be objects under another name
        return f"it has no <object>, but <{foreign.tag[:80]}>, which is not VOC's, with content"
    if (root.text or "").strip() and not children:
        return f"it has no elements, but text: {root.text.strip()[:40]!r}"
    return None
