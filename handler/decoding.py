"""From the bytes of an image file to an upright RGB photo, whatever the file tries.

Sizes are judged from the header before any pixel is decoded. Whole-image copies are avoided: colours are converted in
bands, and what is far larger than wanted is reduced on the way, so that memory is the decoded file and little more.
This module imports no torch, so that the process of `isolation.py` starts quickly and stays small.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from handler.config import ImageLimits, PreprocessingConfig
from handler.errors import ImageTooLarge, InvalidImage, RequestError, UnsupportedFormat
from handler.resizing import resized

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
FORMATS_TEXT = "JPEG, PNG, WebP, GIF, BMP or TIFF"
MAX_SCANS = 100
"""Of a JPEG. Progressive encoders write some ten; each one more is a pass over all pixels that costs a sender 60 bytes."""
REDUCTIONS = (16, 8, 4, 2)
"""The scales at which JPEG can be decoded, and to which other formats are reduced alike."""
_BAND_PIXELS = 1_000_000
LONGEST_CROPPED = 32
"""How many times longer than wide a photo is resized as a whole before it is cropped."""

# `ImageLimits` is checked after the header and before the pixels. Pillow's own limit warns where ours should answer.
Image.MAX_IMAGE_PIXELS = None
# It also warns about damaged metadata, in words that differ from file to file: a log that clients could fill.
warnings.filterwarnings("ignore", module=r"PIL\.")

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


@dataclass(frozen=True)
class Photo:
    """An upright RGB image, and what its file said of itself."""

    image: Image.Image
    """Mode RGB. Perhaps at reduced scale, so its size can be below `width` and `height`."""
    width: int
    height: int
    """In pixels, upright, at full scale."""
    format: str


class Costly(Exception):
    """The image has more pixels than the caller of `decode` wants to spend time and memory on."""


def decode(
    data: bytes, limits: ImageLimits, *, smallest_side: int | None = None, affordable_pixels: int | None = None
) -> Photo:
    """Decode the first frame of an image file: orientation applied, alpha on white, more than 8 bits scaled.

    smallest_side: allow 1/2 to 1/16 of the scale as long as no side falls below this many pixels.
    affordable_pixels: raise Costly, before pixels are decoded, for an image that the limits allow and that has more.

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
            if affordable_pixels is not None and width * height > affordable_pixels:
                raise Costly
            if smallest_side is not None and file_format in ("JPEG", "MPO"):
                image.draft(None, (smallest_side, smallest_side))
            image.load()
            orientation = _orientation(image)  # only now: Pillow turns a TIFF itself while it loads
            photo = _as_rgb(image, _reduction(image, smallest_side))
    except (RequestError, Costly):
        raise
    except MemoryError:
        raise ImageTooLarge("the image needs more memory to decode than the server grants: send it smaller") from None
    except Exception as error:  # Pillow raises a dozen types on damaged files; whichever it is, the file is at fault
        raise InvalidImage(f"the image cannot be decoded, it seems damaged or cut off ({_reason(error)})") from error
    if 2 <= orientation <= 8:
        photo = photo.transpose(_UPRIGHT[orientation])
    if orientation >= 5:
        width, height = height, width
    return Photo(photo, width, height, "JPEG" if file_format == "MPO" else file_format)


def fitted(photo: Image.Image, config: PreprocessingConfig) -> np.ndarray:
    """An RGB photo to pixels (size, size, 3), uint8, read-only, as `config.fit` and `config.interpolation` say."""
    size, interpolation = config.size, config.interpolation
    if config.fit == "stretch":
        return resized(photo, size, size, interpolation)
    # A photo of 16,000 x 1 pixels at full width would take gigabytes; of a longer one only the middle can be in the square.
    longest = LONGEST_CROPPED * min(photo.size)
    if max(photo.size) > longest:
        left, top = (max(0, (side - longest) // 2) for side in photo.size)
        photo = photo.crop((left, top, left + min(photo.width, longest), top + min(photo.height, longest)))
    # integer division and floor offsets as in chainer-caption
    width, height = photo.size
    wide, high = (size * width // height, size) if width > height else (size, size * height // width)
    left, top = (wide - size) // 2, (high - size) // 2
    return resized(photo, wide, high, interpolation)[top : top + size, left : left + size]


def smallest_useful_side(config: PreprocessingConfig) -> int | None:
    """Down to which side a photo may be decoded at reduced scale without a visible change after resizing.

    Nearest-neighbour sampling picks single pixels, which differ at another scale: None then.
    """
    return None if config.interpolation == "nearest" else 2 * config.size


def is_simple(data: bytes) -> bool:
    """Is it, by its first bytes, of a format whose decoder takes a time that its size foretells?"""
    return _is_jpeg(data) or _is_webp(data) or data[:8] == b"\x89PNG\r\n\x1a\n"


def _is_jpeg(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff"


def _is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def _open(data: bytes, limits: ImageLimits) -> Image.Image:
    """Open by header alone; no pixel is decoded."""
    _refuse_large_webp(data, limits)
    # Compressed data never holds this marker: a 0xff in it is followed by 0x00.
    if _is_jpeg(data) and data.count(b"\xff\xda") > MAX_SCANS:
        raise ImageTooLarge(f"the JPEG has more than {MAX_SCANS} scans: save it anew with usual settings")
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
    if not _is_webp(data) or len(data) < 30:
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


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation."""


def _orientation(image: Image.Image) -> int:
    try:
        orientation = int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF data does not make the photo unusable
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _reduction(image: Image.Image, smallest_side: int | None) -> int:
    if smallest_side is None:
        return 1
    return next((by for by in REDUCTIONS if min(image.size) // by >= smallest_side), 1)


def _as_rgb(image: Image.Image, reduction: int) -> Image.Image:
    """Any mode that Pillow opens to RGB, transparency laid on white, at 1 / `reduction` of the scale.

    The image itself where it is all that already: to copy it can take as long as to decode it.
    """
    if image.mode == "RGB" and not image.has_transparency_data and reduction == 1:
        return image
    width, height = image.size
    rows = max(1, _BAND_PIXELS // (width * reduction)) * reduction
    bands = [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]
    white = _white_level(image, bands)
    photo = Image.new("RGB", (-(-width // reduction), -(-height // reduction)))
    for band in bands:
        part = _band_as_rgb(image.crop(band), white)
        photo.paste(part.reduce(reduction) if reduction > 1 else part, (0, band[1] // reduction))
    return photo


def _band_as_rgb(band: Image.Image, white: float) -> Image.Image:
    if band.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(band, lab, srgb, outputMode="RGB")
        assert converted is not None  # only with inPlace
        return converted
    if _is_deep(band):
        return Image.fromarray((_values(band) * (255 / white)).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if band.mode == "La":
        band = band.convert("LA")
    if band.has_transparency_data:
        band = band.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB")
    return band.convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def _values(deep: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(deep).astype(np.float64), nan=0.0, posinf=1.0, neginf=0.0)


def _white_level(image: Image.Image, bands: list[tuple[int, int, int, int]]) -> float:
    """The value that stands for white in grey of 16 or 32 bits or floating point; Pillow's `convert` clips at 255."""
    if not _is_deep(image):
        return 255
    if image.mode.startswith("I;16"):
        return 65535
    top = max(float(_values(image.crop(band)).max(initial=0)) for band in bands)
    if image.mode == "I":
        return next(level for level in (255.0, 65535.0, 2.0**32 - 1) if top <= level)
    return 1 if top <= 1 else max(top, 255)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:120]
