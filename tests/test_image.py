"""Known pixels in every format and mode, and the limits that are judged before anything is decoded."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from handler import decoding
from handler.config import ImageLimits, PreprocessingConfig
from handler.errors import ImageTooLarge, InvalidImage, UnsupportedFormat
from handler.image import decode, normalize, pixels
from handler.resizing import resized

Encoded = Callable[..., bytes]
LIMITS = ImageLimits()


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """Colours in the middle of the four quarters: top left, top right, bottom left, bottom right."""
    width, height = image.size
    return [image.getpixel((x, y)) for y in (height // 4, height * 3 // 4) for x in (width // 4, width * 3 // 4)]  # type: ignore[misc]


def close(one: list[tuple[int, ...]], other: list[tuple[int, ...]], tolerance: int = 16) -> bool:
    return bool(np.abs(np.array(one, int) - np.array(other, int)).max() <= tolerance)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_served_format(encoded: Encoded, photo: Image.Image, file_format: str) -> None:
    found = decode(encoded(file_format), LIMITS)
    assert (found.format, found.width, found.height, found.image.mode) == (file_format, 90, 60, "RGB")
    assert close(corners(found.image), corners(photo))


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [
        ("L", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("YCbCr", "JPEG"),
        ("RGBA", "WEBP"),
        ("LAB", "TIFF"),
    ],
)
def test_modes_become_the_same_picture(encoded: Encoded, photo: Image.Image, mode: str, file_format: str) -> None:
    if mode == "LAB":
        from PIL import ImageCms

        rgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(photo, rgb, lab, outputMode="LAB")
    else:
        image = photo.convert(mode)
    expected = corners(image.convert("RGB")) if mode != "LAB" else corners(photo)
    assert close(corners(decode(encoded(file_format, image), LIMITS).image), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(encoded: Encoded, photo: Image.Image, orientation: int) -> None:
    """The file is turned the way a camera would, and must come back upright."""
    turn = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    turned = photo
    for operation in turn.get(orientation, []):
        turned = turned.transpose(operation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded("JPEG", turned, exif=exif), LIMITS)
    assert (found.width, found.height) == (90, 60) == found.image.size
    assert close(corners(found.image), corners(photo))


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "TIFF"])
def test_transparency_lies_on_white(encoded: Encoded, file_format: str) -> None:
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    assert decode(encoded(file_format, image), LIMITS).image.getpixel((10, 10)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    grey = Image.fromarray(np.full((8, 8), 0x8000, np.uint16))
    for file_format in ("PNG", "TIFF"):
        buffer = io.BytesIO()
        grey.save(buffer, file_format)
        assert decode(buffer.getvalue(), LIMITS).image.getpixel((4, 4)) == (128, 128, 128)


@pytest.mark.parametrize("values", [np.linspace(0, 1, 64), np.linspace(0, 1000, 64), np.full(64, np.nan)])
def test_floating_point_tiff(values: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(values.reshape(8, 8).astype(np.float32)).save(buffer, "TIFF")
    image = decode(buffer.getvalue(), LIMITS).image
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert image.getpixel((7, 7)) == ((0, 0, 0) if np.isnan(values[0]) else (255, 255, 255))


def test_the_first_frame_of_an_animation(encoded: Encoded) -> None:
    frames = [Image.new("RGB", (10, 10), colour) for colour in ("red", "blue")]
    for file_format in ("GIF", "WEBP", "TIFF"):
        data = encoded(file_format, frames[0], save_all=True, append_images=frames[1:])
        assert close([decode(data, LIMITS).image.getpixel((5, 5))], [(255, 0, 0)])  # type: ignore[list-item]


def test_a_jpeg_is_decoded_at_reduced_scale_but_reported_in_full(encoded: Encoded) -> None:
    large = Image.effect_noise((1600, 1200), 60).convert("RGB")
    found = decode(encoded("JPEG", large), LIMITS, smallest_side=320)
    assert (found.width, found.height) == (1600, 1200)
    assert found.image.size == (800, 600) or min(found.image.size) >= 320
    assert found.image.size != (1600, 1200)


def bomb_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises this size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def bomb_webp(width: int, height: int) -> bytes:
    content = b"VP8L" + struct.pack("<I", 5) + b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + b"\0" * 9
    return b"RIFF" + struct.pack("<I", 4 + len(content)) + b"WEBP" + content


@pytest.mark.parametrize(
    "data",
    [bomb_png(50_000, 50_000), bomb_png(1, 178_000_000), bomb_webp(9_400, 9_400), b"x" * (20 * 2**20 + 1)],
    ids=["png area", "png side", "webp", "bytes"],
)
def test_what_is_too_large_is_refused_unread(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("pixels were decoded"))
    with pytest.raises(ImageTooLarge, match="limit"):
        decode(data, LIMITS)


def test_the_limits_are_inclusive(encoded: Encoded) -> None:
    data = encoded("PNG")
    decode(data, ImageLimits(max_bytes=len(data), max_pixels=90 * 60, max_side=90))
    for limits in (ImageLimits(max_bytes=len(data) - 1), ImageLimits(max_pixels=90 * 60 - 1), ImageLimits(max_side=89)):
        with pytest.raises(ImageTooLarge):
            decode(data, limits)


@pytest.mark.parametrize("data", [b"", b"hello", b"\x00" * 1000, b"\xff\xd8\xff", b"GIF89a", b"RIFF\0\0\0\0WEBP"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidImage):
        decode(data, LIMITS)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_half_a_file_is_refused(encoded: Encoded, file_format: str) -> None:
    data = encoded(file_format, Image.effect_noise((64, 64), 90).convert("RGB"))
    with pytest.raises(InvalidImage, match=r"cut off|not an image"):
        decode(data[: len(data) // 2], LIMITS)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"  <svg/>", "SVG"),
        (b"8BPS\0\1" + b"\0" * 40, "PSD"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x20ftypheic" + b"\0" * 24, "HEIC"),
        (b"\0\0\0\x20ftypavif" + b"\0" * 24, "AVIF"),
        (b"\0\0\1\0\1\0", "ICO"),
        (b"P6 1 1 255 abc", "Netpbm"),
    ],
)
def test_a_real_format_that_is_not_served_is_named(data: bytes, name: str) -> None:
    with pytest.raises(UnsupportedFormat, match=name):
        decode(data, LIMITS)


def test_pixels_stretch_or_crop() -> None:
    image = Image.new("RGB", (90, 30), "white")
    ImageDraw.Draw(image).rectangle((30, 0, 59, 29), fill="black")  # the middle third
    stretched = pixels(image, PreprocessingConfig(size=60))
    assert stretched.shape == (3, 60, 60)
    assert stretched.dtype == torch.uint8
    assert stretched[0, 30, 5] == 255
    assert stretched[0, 30, 30] == 0
    assert pixels(image, PreprocessingConfig(size=60, fit="crop", interpolation="nearest")).max() == 0


@pytest.mark.parametrize(("size", "expected"), [((100, 333), (224, 745)), ((333, 100), (745, 224))])
def test_crop_scales_the_shorter_side_with_integer_division(
    size: tuple[int, int], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    monkeypatch.setattr(decoding, "resized", lambda image, *to: sizes.append(to[:2]) or resized(image, *to))
    assert pixels(Image.new("RGB", size), PreprocessingConfig(size=224, fit="crop")).shape == (3, 224, 224)
    assert sizes == [expected]


@pytest.mark.parametrize("size", [(16_000, 1), (1, 16_000), (16_000, 20)])
def test_crop_of_a_very_long_photo_never_makes_it_whole(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """16,000 x 1 pixels at full width would be 3,584,000 x 224, which is 3 GB."""
    sizes = []
    monkeypatch.setattr(decoding, "resized", lambda image, *to: sizes.append(to[:2]) or resized(image, *to))
    photo = Image.new("RGB", size, "white")
    photo.paste("black", (size[0] // 2 - 40, 0, size[0] // 2 + 40, size[1]) if size[0] > 1 else (0, 7960, 1, 8040))
    cropped = pixels(photo, PreprocessingConfig(size=224, fit="crop", interpolation="nearest"))
    assert max(sizes[0]) <= 224 * 32
    assert cropped.shape == (3, 224, 224)
    assert cropped[:, 112, 112].max() == 0  # it is the middle


def test_normalize_is_scale_mean_std_in_channel_order() -> None:
    image = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1)
    config = PreprocessingConfig(channel_order="BGR", scale=2, mean=(1, 2, 3), std=(1, 2, 4))
    assert normalize(image, config).flatten().tolist() == [(60 - 1) / 1, (40 - 2) / 2, (20 - 3) / 4]
