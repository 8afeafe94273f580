"""From the bytes of an image file to the encoder's input.

`decode` judges the file and gives an upright RGB photo, `pixels` brings it to the model's size, `normalize` to the
model's numbers. Training, evaluation, the command line and the server all come through here.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from handler.config import ImageLimits, PreprocessingConfig
from handler.errors import ImageTooLarge, InvalidImage, RequestError, UnsupportedFormat

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
FORMATS_TEXT = "JPEG, PNG, WebP, GIF, BMP or TIFF"

# `ImageLimits` is checked after the header and before the pixels. Pillow's own limit warns where ours should answer.
Image.MAX_IMAGE_PIXELS = None

_UNSERVED_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"8BPS", "PSD"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"\x00\x00\x01\x00", "ICO"),
    (0, b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"),
    (0, b"icns", "ICNS"),
    (0, b"gimp xcf", "XCF"),
    (0, b"FORM", "IFF"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
    (4, b"ftyp", "HEIC or another ISO media format"),
)
_NETPBM = tuple(f"P{n}".encode() for n in "1234567")

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@dataclass(frozen=True)
class Photo:
    """An upright RGB image, and what its file said of itself."""

    image: Image.Image
    """Mode RGB. Of a JPEG perhaps at reduced scale, so its size can be below `width` and `height`."""
    width: int
    height: int
    """In pixels, upright, at full scale."""
    format: str


def decode(data: bytes, limits: ImageLimits, *, smallest_side: int | None = None) -> Photo:
    """Decode the first frame of an image file: orientation applied, alpha on white, more than 8 bits scaled.

    smallest_side: allow a JPEG to be decoded at 1/2, 1/4 or 1/8 as long as no side falls below this many pixels.

    Raises InvalidImage, UnsupportedFormat or ImageTooLarge.
    """
    if not data:
        raise InvalidImage(f"the image is empty (0 bytes): send the bytes of a {FORMATS_TEXT} file")
    if len(data) > limits.max_bytes:
        raise ImageTooLarge(
            f"the image has {len(data):,} bytes, the limit is {limits.max_bytes:,}: send a smaller or more compressed one"
        )
    try:
        with _open(data, limits) as image:
            width, height, file_format = image.width, image.height, image.format or ""
            if smallest_side is not None and image.format == "JPEG":
                image.draft(None, (smallest_side, smallest_side))
            turned = _is_turned(image)
            photo = _as_rgb(_upright(image))
    except RequestError:
        raise
    except Exception as error:  # Pillow raises a dozen types on damaged files; whichever it is, the file is at fault
        raise InvalidImage(f"the image cannot be decoded, it seems damaged or cut off ({_reason(error)})") from error
    if turned:
        width, height = height, width
    return Photo(photo, width, height, "JPEG" if file_format == "MPO" else file_format)


def pixels(photo: Image.Image, config: PreprocessingConfig) -> Tensor:
    """An RGB photo to uint8 pixels (3, size, size), RGB, as `config.fit` and `config.interpolation` say."""
    size, resampling = config.size, _RESAMPLING[config.interpolation]
    if config.fit == "stretch":
        photo = photo.resize((size, size), resampling)
    else:  # integer division and floor offsets as in chainer-caption
        width, height = photo.size
        wide, high = (size * width // height, size) if width > height else (size, size * height // width)
        left, top = (wide - size) // 2, (high - size) // 2
        photo = photo.resize((wide, high), resampling).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(photo, dtype=np.uint8)).permute(2, 0, 1)


def normalize(images: Tensor, config: PreprocessingConfig) -> Tensor:
    """Pixels (B, 3, H, W) in 0..255, RGB, any dtype, to the encoder's float32 input (B, 3, H, W)."""
    if config.channel_order == "BGR":
        images = images.flip(1)
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (config.mean, config.std))
    return (images * config.scale - mean) / std


def smallest_useful_side(config: PreprocessingConfig) -> int | None:
    """Down to which side a JPEG may be decoded at reduced scale without a visible change after resizing.

    Nearest-neighbour sampling picks single pixels, which differ at another scale: None then.
    """
    return None if config.interpolation == "nearest" else 2 * config.size


def _open(data: bytes, limits: ImageLimits) -> Image.Image:
    """Open by header alone; no pixel is decoded."""
    _refuse_large_webp(data, limits)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        name = _unserved_format(data)
        if name is not None:
            raise UnsupportedFormat(f"{name} files are not served: send {FORMATS_TEXT}") from None
        raise InvalidImage(f"the data is not an image that can be decoded: send the bytes of a {FORMATS_TEXT} file") from None
    _check_size(image.width, image.height, limits)
    return image


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if max(width, height) > limits.max_side:
        raise ImageTooLarge(f"the image is {width} x {height} pixels, the limit is {limits.max_side:,} a side: send it smaller")
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"the image is {width} x {height}, {width * height:,} pixels, the limit is {limits.max_pixels:,}: send it smaller"
        )


def _refuse_large_webp(data: bytes, limits: ImageLimits) -> None:
    """Pillow allocates a WebP's whole canvas when it opens the file, so its size is read here before that.

    Layout: RFC 9649, sections 2.5 to 2.7.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return
    chunk = data[12:16]
    if chunk == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    _check_size(width, height, limits)


def _unserved_format(data: bytes) -> str | None:
    """The name of a real image format that is recognised only to be refused by name."""
    for offset, signature, name in _UNSERVED_SIGNATURES:
        if data.startswith(signature, offset):
            return name
    if data[:2] in _NETPBM and data[2:3].isspace():
        return "Netpbm"
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"<svg") or (head.startswith((b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in data[:4096].lower()):
        return "SVG"
    return None


def _is_turned(image: Image.Image) -> bool:
    """Does the EXIF orientation exchange width and height?"""
    return _orientation(image) in (5, 6, 7, 8)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF data does not make the photo unusable
        return 1


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    return ImageOps.exif_transpose(image) if 2 <= _orientation(image) <= 8 else image


def _as_rgb(image: Image.Image) -> Image.Image:
    """Any mode that Pillow opens to RGB, transparency laid on white."""
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # only with inPlace
        return converted
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = _eight_bits(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or floating point, scaled to 8 bits; Pillow's `convert` would clip it to white."""
    values = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I;16"):
        values /= 257
    elif image.mode == "I":
        top = values.max(initial=0)
        values /= 1 if top <= 255 else 257 if top <= 65535 else (2**32 - 1) / 255
    else:
        values = np.nan_to_num(values, nan=0.0, posinf=1.0, neginf=0.0)
        if values.max(initial=0) <= 1:
            values *= 255
        elif values.max() > 255:
            values *= 255 / values.max()
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8), mode="L")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:120]
