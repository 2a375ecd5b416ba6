"""Every kind of image file: its brightness is right, training and detection read the same, and damage is noticed."""

import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageCms, ImageOps

from doublehead.data import DataError, images, jpeg, read_image
from doublehead.data.images import check_image


def photo(height=45, width=70):
    """Smooth, as photographs are."""
    small = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def pixels_of(path):
    """As training reads it, which must be as detection does."""
    trained, found = read_image(path), read_image(path, upright=True)
    assert trained.dtype == found.dtype == torch.uint8 and trained.is_contiguous()
    assert found.permute(1, 2, 0).is_contiguous()  # drawn and uploaded without a copy
    assert torch.equal(trained, found)
    return trained.permute(1, 2, 0).numpy()


def by_pillow(path):
    with Image.open(path) as picture:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 100}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_to_the_bit_as_pillow(tmp_path, mode, options, monkeypatch):
    photo().convert(mode).save(tmp_path / "a.jpg", **options)
    assert np.array_equal(pixels_of(tmp_path / "a.jpg"), by_pillow(tmp_path / "a.jpg"))
    monkeypatch.setattr(jpeg, "_simplejpeg", lambda: None)
    assert np.array_equal(pixels_of(tmp_path / "a.jpg"), by_pillow(tmp_path / "a.jpg"))


def saved(path, picture, **options):
    picture.save(path, **options)
    return path


MADE = {
    "1.png": ("1", {}), "L.png": ("L", {}), "LA.png": ("LA", {}), "P.png": ("P", {}), "RGBA.png": ("RGBA", {}),
    "P-clear.png": ("P", {"transparency": bytes([0, 128])}), "RGB-clear.png": ("RGB", {"transparency": (0, 0, 0)}),
    "L-clear.png": ("L", {"transparency": 0}), "P.gif": ("P", {}), "RGB.bmp": ("RGB", {}), "RGB.ppm": ("RGB", {}),
    "CMYK.tif": ("CMYK", {}), "YCbCr.tif": ("YCbCr", {}), "L.tif": ("L", {}), "1.tif": ("1", {}),
    "RGBA.webp": ("RGBA", {"lossless": True}), "RGB.webp": ("RGB", {"lossless": True}),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", MADE)
def test_modes_of_8_bits_and_fewer(tmp_path, name):
    """Against the picture that was written, not against a reader."""
    mode, options = MADE[name]
    picture = photo().convert(mode)
    if "A" in mode:
        picture.putalpha(100)
    read = pixels_of(saved(tmp_path / name, picture, **options))
    expected = np.asarray(picture.convert("RGBA").convert("RGB") if "A" in mode else picture.convert("RGB"))
    if "webp" in name or "A" not in mode:
        assert np.array_equal(read, expected)
    else:
        assert np.array_equal(read, np.asarray(picture.convert("RGBA"))[..., :3])


def png(bits, colour, rows, width):
    """A PNG by hand, of depths that no library here writes."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_brightness_of_other_depths(tmp_path):
    grey16 = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    levels = [[0, 0, 1], [128, 255, 255]]
    deep = struct.pack(">6H", 0x1234, 0xFF00, 0x00FF, 0x8000, 0x7FFF, 0xABCD)
    files = {
        "16.png": (lambda path: Image.fromarray(grey16).save(path), levels),
        "16.tif": (lambda path: Image.fromarray(grey16).save(path), levels),
        "16-big-endian.tif": (lambda path: saved(path, Image.fromarray(grey16.astype(">u2"))), levels),
        "16-white-is-zero.tif": (
            lambda path: Image.fromarray(grey16).save(path, tiffinfo={262: 0}), [[255, 255, 254], [127, 0, 0]],
        ),
        "16.pgm": (lambda path: path.write_bytes(b"P5 3 2 65535\n" + grey16.astype(">u2").tobytes()), levels),
        "10.pgm": (lambda path: path.write_bytes(b"P5 3 1 1023\n" + struct.pack(">3H", 0, 512, 1023)), [[0, 128, 255]]),
        "6.pgm": (lambda path: path.write_bytes(b"P5 3 1 63\n" + bytes([0, 32, 63])), [[0, 130, 255]]),
        "rgb16.png": (lambda path: path.write_bytes(png(16, 2, [deep], 2)), [[0xFF, 0x7F]]),
        "2.png": (lambda path: path.write_bytes(png(2, 0, [bytes([0b00011011])], 4)), [[0, 85, 170, 255]]),
        "4.png": (lambda path: path.write_bytes(png(4, 0, [bytes([0x0F, 0x80])], 3)), [[0, 255, 136]]),
    }  # fmt: skip
    for name, (write, green) in files.items():
        write(tmp_path / name)
        assert pixels_of(tmp_path / name)[..., 1].tolist() == green, name


def test_pixels_without_a_fixed_white_are_refused_by_all(tmp_path):
    pictures = {
        "F": Image.fromarray(np.full((3, 3), 0.5, np.float32)),
        "I": Image.fromarray(np.full((3, 3), 70_000, np.int32)),
    }
    for mode, picture in pictures.items():
        picture.save(tmp_path / "a.tif")
        looked = (lambda path: read_image(path, upright=True), lambda path: check_image(path, None, True))
        for read in (read_image, *looked):
            with pytest.raises(DataError, match=f"a.tif: cannot read this image: pixels of mode {mode} have no fixed"):
                read(tmp_path / "a.tif")
    signed = Image.fromarray(np.full((3, 3), 9, np.int32))
    signed.save(tmp_path / "b.tif", tiffinfo={258: 12})
    with pytest.raises(DataError, match="b.tif: cannot read this image"):
        read_image(tmp_path / "b.tif")


def test_signed_pixels_are_refused_by_all(tmp_path):
    Image.fromarray(np.full((3, 3), 200, np.uint8)).save(tmp_path / "a.tif", tiffinfo={339: 2})
    for read in (read_image, lambda path: read_image(path, upright=True), lambda path: check_image(path, None, True)):
        with pytest.raises(DataError, match="a.tif: cannot read this image: signed pixels have no fixed white"):
            read(tmp_path / "a.tif")


def test_lab_becomes_rgb(tmp_path):
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    ImageCms.applyTransform(photo(), to_lab).save(tmp_path / "a.tif")
    assert np.abs(pixels_of(tmp_path / "a.tif").astype(int) - np.asarray(photo())).mean() < 2  # its steps are coarse


def test_of_several_frames_the_first(tmp_path):
    first, second = photo(), ImageOps.invert(photo())
    for name in ("a.tif", "a.png", "a.webp"):
        options = {"lossless": True} if name == "a.webp" else {}
        first.save(tmp_path / name, save_all=True, append_images=[second], **options)
        assert np.array_equal(pixels_of(tmp_path / name), np.asarray(first)), name


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
@pytest.mark.parametrize("orientation", range(0, 10))
def test_detection_turns_pictures_upright(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[images.EXIF_ORIENTATION] = orientation
    photo().save(tmp_path / name, exif=exif)
    expected = by_pillow(tmp_path / name)
    assert expected.shape == ((70, 45, 3) if 5 <= orientation <= 8 else (45, 70, 3))
    assert np.array_equal(read_image(tmp_path / name, upright=True).permute(1, 2, 0).numpy(), expected)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it finds there
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("note", [b"no TIFF header", b"", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff\x12\x01"])
def test_a_broken_exif_note_costs_no_picture(tmp_path, name, note):
    """Which training would find out only when it decodes the image."""
    options = {"lossless": True} if name == "a.webp" else {"quality": 100, "subsampling": 0}
    photo().save(tmp_path / name, exif=b"Exif\0\0" + note, **options)
    assert np.abs(pixels_of(tmp_path / name).astype(int) - np.asarray(photo())).mean() < 2
    assert check_image(tmp_path / name, (45, 70)) == (45, 70)
    with pytest.raises(DataError, match=f"{name}: the image is 70x45"):
        read_image(tmp_path / name, (70, 45))


@pytest.mark.parametrize("upright", [False, True])
def test_damaged_pixels_are_not_taken_for_a_broken_exif_note(tmp_path, upright):
    """PNG's note may stand behind the pixels: Pillow decodes them to get there, and only the first try fails."""
    memory = io.BytesIO()
    photo().save(memory, "PNG")
    content = bytearray(memory.getvalue())
    place = content.index(b"IDAT") + 400
    content[place : place + 200] = bytes(200)
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match="a.png: cannot read this image"):
        read_image(tmp_path / "a.png", upright=upright)


# ---------------------------------------------------------------------- damage


def whole_jpegs():
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}):
        for mode in ("RGB", "L", "CMYK"):
            memory = io.BytesIO()
            photo(90, 120).convert(mode).save(memory, "JPEG", **options)
            yield memory.getvalue()


def test_a_jpeg_that_ends_early_but_has_its_end_marker(tmp_path):
    """libjpeg fills the rest with grey and says nothing that Pillow hears."""
    rng, path, unheard = random.Random(0), tmp_path / "a.jpg", 0
    for content in whole_jpegs():
        path.write_bytes(content)
        pixels_of(path)
        begin = content.index(b"\xff\xda") + 20
        for _ in range(6):
            path.write_bytes(content[: rng.randrange(begin, len(content) - 12)] + b"\xff\xd9")
            unheard += is_read(path)
            for read in (read_image, lambda path: read_image(path, upright=True)):
                with pytest.raises(DataError, match="a.jpg: cannot read this image: damaged: some pixels are missing"):
                    read(path)
    assert unheard > 30


def is_read(path):
    try:
        Image.open(path).load()
    except (OSError, SyntaxError):
        return False
    return True


def test_a_few_spare_bytes_before_the_end_marker_are_padding(tmp_path):
    memory = io.BytesIO()
    photo().save(memory, "JPEG")
    content, path = memory.getvalue(), tmp_path / "a.jpg"
    path.write_bytes(content)
    before = pixels_of(path)
    path.write_bytes(content[:-2] + bytes(12) + content[-2:])
    assert np.array_equal(pixels_of(path), before)
    path.write_bytes(content[:-2] + bytes(300) + content[-2:])
    with pytest.raises(DataError, match="damaged"):
        read_image(path)


def with_harmless_faults(content):
    """What cameras, phones and tools write, under a name each; their pixels are all there."""
    tables, scan = content.index(b"\xff\xdb"), content.index(b"\xff\xda")
    begin = scan + 2 + int.from_bytes(content[scan + 2 : scan + 4], "big")
    yield "a phone's parameters of the scan", content[: begin - 3] + bytes(3) + content[begin:]
    yield "two bytes between segments", content[:tables] + b"\0\xff\0" + content[tables:]
    yield "many bytes between segments", content[:scan] + bytes(range(200)) + content[scan:]
    yield "a colour profile's empty part", content[:2] + b"\xff\xe2\0\x10ICC_PROFILE\0\5\2" + content[2:]
    yield "bytes behind the end", content + b"appended\xff\xd9" * 30
    faults = content[: begin - 3] + bytes(3) + content[begin:-2] + bytes(12) + content[-2:]
    yield "several", faults[:tables] + bytes(5) + faults[tables:] + b"a trailer"


def test_what_cameras_and_phones_write_is_read(tmp_path):
    memory, path = io.BytesIO(), tmp_path / "a.jpg"
    photo().save(memory, "JPEG")
    path.write_bytes(memory.getvalue())
    before = pixels_of(path)
    for name, content in with_harmless_faults(memory.getvalue()):
        path.write_bytes(content)
        assert np.array_equal(pixels_of(path), before), name
        assert images.check_image(path, (45, 70), decode=True) == (45, 70), name


def test_harmless_faults_hide_no_damage(tmp_path):
    """libjpeg tells the first warning alone, which must not excuse what is wrong behind it."""
    memory, path = io.BytesIO(), tmp_path / "a.jpg"
    photo(90, 120).save(memory, "JPEG", restart_marker_rows=1)
    content = memory.getvalue()
    third = content.index(b"\xff\xd2")
    damaged = content[:third] + bytes(40) + content[third:]
    for name, faulty in with_harmless_faults(damaged[:-2] + bytes(12) + damaged[-2:]):
        path.write_bytes(faulty)
        with pytest.raises(DataError, match="damaged: some pixels are missing .*before marker 0xd2"):
            pytest.fail(name) if len(pixels_of(path)) else None


def test_what_simplejpeg_does_not_know_pillow_reads(tmp_path, monkeypatch):
    def unknown(*_, **__):
        raise ValueError("Unsupported JPEG process")

    photo().save(tmp_path / "a.jpg")
    expected = pixels_of(tmp_path / "a.jpg")
    monkeypatch.setattr(simplejpeg, "decode_jpeg", unknown)
    assert np.array_equal(pixels_of(tmp_path / "a.jpg"), expected)


@pytest.mark.parametrize("options", [{"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {"format": "PNG"}])
def test_cut_at_any_place(tmp_path, options):
    memory, path = io.BytesIO(), tmp_path / "cut"
    photo(24, 33).save(memory, **options)
    whole = memory.getvalue()
    path.write_bytes(whole)
    expected, read = pixels_of(path), []
    for length in [*range(0, len(whole) - 40, 11), *range(len(whole) - 40, len(whole))]:
        path.write_bytes(whole[:length])
        try:
            assert np.array_equal(pixels_of(path), expected)
            read.append(length)
        except DataError:
            pass
    assert all(length >= len(whole) - 24 for length in read)  # nothing but checksums and end marks is missing


# ---------------------------------------------------------------------- what must not be opened, or not be decoded


def test_only_regular_files_are_opened(tmp_path):
    """A pipe would be waited for without end."""
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").mkdir()
    (tmp_path / "c.jpg").symlink_to(tmp_path / "c.jpg")
    (tmp_path / "d.jpg").symlink_to("/dev/zero")
    (tmp_path / "real.png").write_bytes(b"")
    photo().save(tmp_path / "real.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    for name, said in (("a", "a pipe, socket or device"), ("b", "a folder"), ("c", "Too many levels"), ("d", "a pipe")):
        for read in (read_image, lambda path: check_image(path, None)):
            with pytest.raises(DataError, match=f"{name}.jpg: cannot read this image: .*{said}"):
                read(tmp_path / f"{name}.jpg")
    assert read_image(tmp_path / "link.png").shape == (3, 45, 70)


@pytest.mark.parametrize("name", ["a.eps", "a.jpg"])
def test_drawing_commands_are_not_run(tmp_path, name):
    """Pillow would start Ghostscript with a file from elsewhere, whatever the file is called."""
    (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    for read in (read_image, lambda path: read_image(path, upright=True), lambda path: check_image(path, (10, 10))):
        with pytest.raises(DataError, match=f"{name}: cannot read this image: it holds drawing commands .EPS."):
            read(tmp_path / name)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    def decode(*_):
        raise AssertionError("decoded")

    bomb = tmp_path / "bomb.png"
    Image.new("1", (12_000, 12_000)).save(bomb)
    assert bomb.stat().st_size < 1 << 17
    photo().save(tmp_path / "small.png")
    monkeypatch.setattr(images, "to_rgb", decode)
    for read in (read_image, lambda path, **more: check_image(path, None, True, **more)):
        with pytest.raises(DataError, match="12000x12000 .* 144,000,000 pixels, 100,000,000 are accepted.*max-pixels"):
            read(bomb)
        with pytest.raises(DataError, match="3,150 pixels, 3,149 are accepted") as caught:
            read(tmp_path / "small.png", max_pixels=3149)
        assert caught.value.reason == "too many pixels"
    (tmp_path / "huge.png").write_bytes(png(8, 2, [bytes(3)], 2**31 - 1))
    with pytest.raises(DataError, match="huge.png: the image has more than 178,956,970 pixels"):
        read_image(tmp_path / "huge.png")


# ---------------------------------------------------------------------- hostile files


def mutated(rng, content):
    """A file cut, spliced, with bits turned, zeros in it, or numbers in its header set to extremes."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content))
        kind = rng.randrange(6)
        if kind == 0:
            content = content[: max(1, at)]
        elif kind == 1:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            content[at : at + rng.randrange(1, 64)] = bytes(rng.randrange(1, 64))
        elif kind == 3:
            at = rng.randrange(min(len(content), 200))
            content[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4), b"\xff\xd9\xff\xd8"])
        elif kind == 4:
            content[at:at] = rng.randbytes(rng.randrange(1, 40))
        else:
            other = rng.randrange(len(content))
            content = content[:at] + content[other:] or bytearray(b"x")
    return bytes(content)


def test_hostile_pictures_end_in_pixels_or_one_error(tmp_path, seeded, rounds):
    wholes = []
    for name in ("a.jpg", "a.png", "a.gif", "a.bmp", "a.tif", "a.webp", "a.ppm"):
        memory = io.BytesIO()
        photo().save(memory, Image.registered_extensions()[os.path.splitext(name)[1]])
        wholes.append((name, memory.getvalue()))
    refused = 0
    for number in range(rounds(25)):
        for name, whole in wholes:
            path = tmp_path / name
            path.write_bytes(mutated(seeded, whole))
            try:
                image = read_image(path, upright=True, max_pixels=1_000_000)
            except DataError as error:
                refused += 1
                assert str(path) in str(error) and "\n" not in str(error), (number, name)
                continue
            assert image.dtype == torch.uint8 and image.shape[0] == 3 and 0 < image[0].numel() <= 1_000_000
    assert refused > rounds(25) * 3  # some damage lies where nothing is: in notes, behind the end
