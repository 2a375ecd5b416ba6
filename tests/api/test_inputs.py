"""Images as people have them: each kind gives the same pixels, and each mistake its one line."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from doublehead.api.inputs import to_tensor, to_tensors
from doublehead.data import DataError, read_image
from doublehead.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
CHW = torch.from_numpy(PIXELS).permute(2, 0, 1)


@pytest.mark.parametrize("image", [
    PIXELS, CHW, CHW.contiguous(), Image.fromarray(PIXELS), Image.fromarray(PIXELS).convert("RGBA"),
    PIXELS[:, ::-1][:, ::-1], np.asfortranarray(PIXELS), PIXELS[..., ::-1].copy()[..., ::-1],
])  # fmt: skip
def test_levels_of_8_bits_are_kept(image):
    assert torch.equal(to_tensor(image), CHW) and to_tensor(image).dtype == torch.uint8


@pytest.mark.parametrize("image", [
    PIXELS / 255, (PIXELS / 255).astype(np.float32), CHW / 255, (CHW / 255).double(), (CHW / 255).requires_grad_(),
])  # fmt: skip
def test_floats_become_single_precision(image):
    found = to_tensor(image)
    torch.testing.assert_close(found, CHW / 255, atol=1e-7, rtol=0)
    assert found.dtype == torch.float32 and not found.requires_grad


@pytest.mark.parametrize("image", [
    PIXELS[..., 0], PIXELS[..., :1], CHW[0], CHW[:1], Image.fromarray(PIXELS[..., 0]),
    Image.fromarray(PIXELS[..., 0].astype(np.uint16) << 8),
])  # fmt: skip
def test_grey_becomes_three_channels(image):
    assert torch.equal(to_tensor(image), CHW[:1].expand(3, -1, -1))


def test_a_file_is_read_upright_and_a_picture_as_it_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert torch.equal(to_tensor(tmp_path / "a.jpg"), read_image(tmp_path / "a.jpg", upright=True))
    assert torch.equal(to_tensor(str(tmp_path / "a.jpg")), to_tensor(tmp_path / "a.jpg"))
    with Image.open(tmp_path / "a.jpg") as picture, pytest.warns(UserWarning, match="exif_transpose"):
        assert torch.equal(to_tensor(picture), read_image(tmp_path / "a.jpg"))
    assert torch.equal(
        to_tensor(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))), to_tensor(tmp_path / "a.jpg")
    )


def test_a_picture_keeps_its_notes():
    picture = Image.fromarray(PIXELS).quantize(8)
    picture.info["transparency"] = 0
    assert to_tensor(picture).shape == (3, 20, 30) and picture.info["transparency"] == 0


@pytest.mark.parametrize("image, message", [
    (PIXELS.astype(np.float32), r"go up to 255: divide by 255, or give them as uint8"),
    (CHW.float(), r"go up to 255: divide by 255, or give them as uint8"),
    (CHW * 257.0, r"divide by their largest possible level \(65535 for 16 bits\)"),
    (CHW / 127.5 - 1, r"run from -1 to 1: the model subtracts mean"),
    (PIXELS * float("nan"), "NaN or infinite"),
    (CHW / 255 * float("inf"), "NaN or infinite"),
    (PIXELS.astype(np.int64), r"these are int64: .*image.astype\(numpy.uint8\)"),
    (PIXELS.astype(bool), "these are bool"),
    (CHW.int(), r"these are torch.int32: .*image.to\(torch.uint8\)"),
    (PIXELS.transpose(2, 0, 1), r"image is \[3, 20, 30\], arrays are .*image.transpose\(1, 2, 0\)"),
    (CHW.permute(1, 2, 0), r"image is \[20, 30, 3\], tensors are .*image.permute\(2, 0, 1\)"),
    (np.dstack([PIXELS, PIXELS[..., :1]]), r"image\[..., :3\] leaves out"),
    (CHW[[0, 1, 2, 0]], r"image\[:3\] leaves out"),
    (CHW[:2], r"image is \[2, 20, 30\]"),
    (PIXELS[:0], r"image is \[0, 30, 3\]"),
    (CHW[..., :0], r"image is \[3, 20, 0\]"),
    (PIXELS.astype(object), "these are object"),
    (Image.new("F", (3, 3)), "mode F have no fixed white"),
    (Image.new("RGB", (0, 3)), "no pixels"),
    ("https://somewhere/a.jpg", "a URL: download it first .*curl"),
    ("s3://somewhere/a.jpg", "a URL: download it first .*aws"),
    ("rtsp://camera/1", "a stream: .*ffmpeg"),
    ("street.MP4", "a video: .*ffmpeg"),
    (".", "a folder: .*glob"),
    ("*.jpg", r"glob.glob\('\*.jpg'\)"),
    ("nowhere.jpg", "nowhere.jpg: no such image file"),
    ("a\0b", "cannot read this image"),
])  # fmt: skip
def test_a_wrong_image_is_one_line(image, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        to_tensor(image)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("image, message", [
    (None, "cv2.imread gives None"), (3, "an int"), (b"\xff\xd8", "io.BytesIO"), ({"image": CHW}, "the images alone"),
])  # fmt: skip
def test_what_is_no_image_is_one_line(image, message):
    with pytest.raises(TypeError, match=message):
        to_tensors(image)


def test_a_message_names_the_image_of_a_list(tmp_path):
    for wrong, error in ((CHW.float(), UserError), ([[1]], TypeError), (None, TypeError)):
        images, single = to_tensors([CHW, wrong])
        assert not single and torch.equal(next(images), CHW)
        with pytest.raises(error, match=r"images\[1\]"):
            next(images)


def test_one_several_and_batches():
    for one in (CHW, PIXELS, Image.fromarray(PIXELS)):
        images, single = to_tensors(one)
        assert single and len(list(images)) == 1
    for several in (
        [CHW, PIXELS],
        (CHW, PIXELS),
        (x for x in [CHW, PIXELS]),
        CHW.expand(2, -1, -1, -1),
        PIXELS[None][[0, 0]],
    ):
        images, single = to_tensors(several)
        assert not single and all(torch.equal(image, CHW) for image in images)
    assert list(to_tensors([])[0]) == [] and not to_tensors([])[1]


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match="a.png: cannot read this image"):
        to_tensor(tmp_path / "a.png")
    Image.fromarray(PIXELS).save(tmp_path / "b.png")
    with pytest.raises(DataError, match="600 pixels, 100 are accepted"):
        to_tensor(tmp_path / "b.png", max_pixels=100)
