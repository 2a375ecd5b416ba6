"""Image files of every mode become uint8 RGB; broken ones a DataError that names them."""

from __future__ import annotations

import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from doublehead.data import DataError, DataWarning, build_dataset, opening, read_image
from doublehead.data.images import check_image
from tests.support.data_samples import CocoFolder, VocFolder, picture


def pixels_of(path, size=None) -> np.ndarray:
    image = read_image(path, size)
    assert image.dtype == torch.uint8 and image.is_contiguous()
    return image.permute(1, 2, 0).numpy()


def test_rgb_is_kept(tmp_path):
    pixels = picture(tmp_path / "a.png", 7, 5)
    assert np.array_equal(pixels_of(tmp_path / "a.png"), pixels)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA"])
def test_other_8_bit_modes(tmp_path, mode):
    picture(tmp_path / "rgb.png", 9, 6)
    with Image.open(tmp_path / "rgb.png") as image:
        converted = image.convert(mode)
    converted.save(tmp_path / "a.png")
    assert np.array_equal(pixels_of(tmp_path / "a.png"), np.asarray(converted.convert("RGB")))


def test_alpha_is_dropped_not_blended(tmp_path):
    Image.new("RGBA", (3, 2), (200, 100, 50, 0)).save(tmp_path / "a.png")
    assert (pixels_of(tmp_path / "a.png") == [200, 100, 50]).all()


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)  # no cyan: red
    assert np.abs(pixels_of(tmp_path / "a.jpg").astype(int) - [255, 0, 0]).max() <= 3


def test_16_bit_grey_keeps_the_upper_byte(tmp_path):
    values = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert pixels_of(tmp_path / "a.png")[..., 1].tolist() == [[0, 0, 1], [128, 255, 255]]


def test_16_bit_rgb_keeps_the_upper_byte(tmp_path):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" + struct.pack(">6H", 0x1234, 0xFF00, 0x00FF, 0x8000, 0x7FFF, 0xABCD)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert pixels_of(tmp_path / "a.png").tolist() == [[[0x12, 0xFF, 0x00], [0x80, 0x7F, 0xAB]]]


def test_floating_point_is_refused(tmp_path):
    Image.fromarray(np.zeros((3, 3), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="a.tif.*mode F"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed_where_the_size_asks_for_it(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture(tmp_path / "a.png", 6, 4, exif=exif)
    path = tmp_path / "a.png"
    assert np.array_equal(pixels_of(path), stored)
    assert np.array_equal(pixels_of(path, (4, 6)), stored)
    assert check_image(path, None) == check_image(path, (4, 6)) == (4, 6)
    if orientation < 5:
        for read in (read_image, check_image):
            with pytest.raises(DataError, match="a.png: the image is 6x4"):
                read(path, (6, 4))
        return
    assert check_image(path, (6, 4)) == (6, 4)
    upright = {5: np.transpose(stored, (1, 0, 2)), 6: np.rot90(stored, -1), 7: np.rot90(stored, 2).transpose(1, 0, 2),
               8: np.rot90(stored, 1)}  # fmt: skip
    assert np.array_equal(pixels_of(path, (6, 4)), upright[orientation])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("keep", [0, 1, 20, 0.5, -1, -100])
def test_truncated_files(tmp_path, suffix, keep):
    path = tmp_path / f"a.{suffix}"
    picture(path)
    blob = path.read_bytes()
    path.write_bytes(blob[: int(len(blob) * keep) if isinstance(keep, float) else keep])
    if suffix == "png" and keep == -1:  # only the end chunk, which holds no pixels, lost a byte
        assert check_image(path, (30, 40)) == (30, 40)
        return
    for read in (read_image, lambda path: check_image(path, (30, 40))):
        with pytest.raises(DataError) as caught:
            read(path)
        assert caught.value.reason == "unreadable image" and str(path) in str(caught.value)


def test_appended_bytes_do_no_harm(tmp_path):
    picture(tmp_path / "a.jpg")
    before = pixels_of(tmp_path / "a.jpg")
    with open(tmp_path / "a.jpg", "ab") as file:
        file.write(b"camera notes")
    assert check_image(tmp_path / "a.jpg", (30, 40)) == (30, 40)
    assert np.array_equal(pixels_of(tmp_path / "a.jpg"), before)


def test_missing_file_folder_and_text(tmp_path):
    (tmp_path / "text.jpg").write_text("<html>404</html>")
    for name, reason in (("none.jpg", "missing image"), ("text.jpg", "unreadable image"), (".", "unreadable image")):
        for read in (read_image, lambda path: check_image(path, None)):
            with pytest.raises(DataError) as caught:
                read(tmp_path / name)
            assert caught.value.reason == reason and str(tmp_path / name) in str(caught.value)


def test_it_is_said_where_decoding_is_tolerant(tmp_path, monkeypatch):
    config = CocoFolder(tmp_path).config()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_dataset(config, "train")
    monkeypatch.setattr(opening, "is_strict", lambda: False)
    with pytest.warns(DataWarning, match="simplejpeg is not installed: decoding is tolerant"):
        build_dataset(config, "train")


def test_the_data_set_holds_images_to_the_limit_of_pixels(tmp_path):
    folder = CocoFolder(tmp_path)
    with pytest.raises(DataError, match="c.jpg: the image has 50x30 .*1,500 pixels, 1,200 are accepted.*max-pixels"):
        build_dataset(folder.config(max_pixels=1200), "val")
    with pytest.raises(ValueError, match="max_pixels is 0, a whole number from 1 to 178956970"):
        build_dataset(folder.config(max_pixels=0), "val")
    assert len(build_dataset(folder.config(max_pixels=1500), "val")) == 3


@pytest.mark.parametrize("kind", ["coco", "voc", "image"])
def test_pipes_among_the_data_are_refused_not_waited_for(tmp_path, kind):
    if kind == "voc":
        folder = VocFolder(tmp_path)
        folder.write()
        config, path = folder.config(), folder.xml_file("two")
    else:
        folder = CocoFolder(tmp_path)
        config = folder.config()
        path = folder.json_file("train") if kind == "coco" else tmp_path / "train" / "a.jpg"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=f"{path.name}: cannot read this .*: it is a pipe"):
        build_dataset(config, "train")
