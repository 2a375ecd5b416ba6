"""Pictures are read as Pillow reads them, whoever decodes; what is cut off or broken is never read."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from doublehead.engine import reading
from doublehead.engine.reading import read_picture

pytestmark = pytest.mark.filterwarnings("ignore:.*TorchCodec:DeprecationWarning")


def photo(height=45, width=70):
    """Smooth, as photographs are."""
    small = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def by_pillow(path):
    with Image.open(path) as picture:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


def pixels_of(path):
    image = read_picture(path)
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    assert image.permute(1, 2, 0).is_contiguous()  # drawn and uploaded without a copy
    return image.permute(1, 2, 0).numpy()


@pytest.fixture
def decoded(monkeypatch):
    """The kinds of file that torchvision decoded."""
    kinds = []
    fast = reading._fast

    def watched(path, kind):
        pixels = fast(path, kind)
        kinds.extend([kind] if pixels is not None else [])
        return pixels

    monkeypatch.setattr(reading, "_fast", watched)
    return kinds


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 100}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg(tmp_path, decoded, mode, options):
    photo().convert(mode).save(tmp_path / "a.jpg", **options)
    difference = np.abs(pixels_of(tmp_path / "a.jpg").astype(int) - by_pillow(tmp_path / "a.jpg"))
    assert decoded == ["JPEG"]
    assert difference.max() <= 3  # two builds of one decoder


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1"])
@pytest.mark.parametrize("options", [{}, {"transparency": 0}])
def test_png(tmp_path, decoded, mode, options):
    picture = photo().convert(mode)
    if "A" in mode:
        picture.putalpha(100)
    picture.save(tmp_path / "a.png", **(options if mode in ("L", "P") else {}))
    assert np.array_equal(pixels_of(tmp_path / "a.png"), by_pillow(tmp_path / "a.png"))
    assert decoded == (["PNG"] if mode != "1" else [])


@pytest.mark.parametrize("mode, name", [("CMYK", "a.jpg"), ("CMYK", "a.tif"), ("P", "a.gif"), ("RGB", "a.bmp"),
                                        ("RGBA", "a.webp"), ("RGB", "a.ppm"), ("L", "a.tif")])  # fmt: skip
def test_what_only_pillow_decodes(tmp_path, decoded, mode, name):
    photo().convert(mode).save(tmp_path / name)
    assert np.array_equal(pixels_of(tmp_path / name), by_pillow(tmp_path / name)) and decoded == []


def test_16_bits_keep_the_upper_8(tmp_path, decoded):
    values = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert pixels_of(tmp_path / name)[..., 1].tolist() == [[0, 0, 1], [128, 255, 255]]

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" + struct.pack(">6H", 0x1234, 0xFF00, 0x00FF, 0x8000, 0x7FFF, 0xABCD)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    body = header + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    (tmp_path / "rgb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert pixels_of(tmp_path / "rgb.png").tolist() == [[[0x12, 0xFF, 0x00], [0x80, 0x7F, 0xAB]]]
    assert decoded == []


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("orientation", range(0, 10))
def test_pictures_are_turned_upright(tmp_path, decoded, name, orientation):
    exif = Image.Exif()
    exif[reading.EXIF_ORIENTATION] = orientation
    photo().save(tmp_path / name, exif=exif)
    expected = by_pillow(tmp_path / name)
    assert expected.shape == ((70, 45, 3) if 5 <= orientation <= 8 else (45, 70, 3))
    assert np.abs(pixels_of(tmp_path / name).astype(int) - expected).max() <= 3
    assert len(decoded) == 1


@pytest.mark.parametrize("options", [{"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {"format": "PNG"}])
def test_whatever_is_cut_off_pillow_has_the_last_word(tmp_path, options):
    memory = io.BytesIO()
    photo(24, 33).save(memory, **options)
    whole, path = memory.getvalue(), tmp_path / "cut"
    expected = read_from(path, whole)
    read = []
    for length in [*range(0, len(whole) - 40, 11), *range(len(whole) - 40, len(whole))]:
        path.write_bytes(whole[:length])
        try:
            by_pillow(path)
        except Exception:
            with pytest.raises(Exception):  # noqa: B017 (decoders raise many kinds)
                read_picture(path)
        else:
            read.append(length)
            assert np.array_equal(pixels_of(path), expected)
    assert all(length >= len(whole) - 24 for length in read)  # nothing but checksums and end marks is missing


def read_from(path, content):
    path.write_bytes(content)
    return pixels_of(path)


def test_a_damaged_png_is_refused(tmp_path):
    memory = io.BytesIO()
    photo().save(memory, format="PNG")
    content = bytearray(memory.getvalue())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(Exception):  # noqa: B017
        read_picture(tmp_path / "a.png")


def test_without_torchvisions_decoders_pillow_reads(tmp_path, monkeypatch):
    import torchvision.io

    photo().save(tmp_path / "a.jpg")
    photo().save(tmp_path / "a.png")
    expected = by_pillow(tmp_path / "a.jpg")

    def missing(*_):
        raise RuntimeError("no libjpeg")

    monkeypatch.setattr(torchvision.io, "decode_jpeg", missing)
    assert np.array_equal(pixels_of(tmp_path / "a.jpg"), expected)
    monkeypatch.delattr(torchvision.io, "decode_png")
    assert np.array_equal(pixels_of(tmp_path / "a.png"), by_pillow(tmp_path / "a.png"))
