"""Hostile, odd and ordinary files and requests, each with the statuses that may answer it.

The corpus is made, not stored: the same seed gives the same bytes. Tests send it to the decoder and over HTTP, and
`scripts/scorecard.py` to a running service. `python -m tests.corpus FOLDER` writes the images for use elsewhere.
"""

from __future__ import annotations

import base64
import gzip
import io
import itertools
import json
import random
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageDraw

SAMPLES = Path(__file__).resolve().parent.parent / "samples"

GOOD = frozenset({200})
DAMAGED = frozenset({400})
TOO_LARGE = frozenset({413})
UNSERVED = frozenset({415})
CLIENT_ERROR = frozenset({400, 413, 415})
ANSWERED = GOOD | CLIENT_ERROR
"""A damaged file may still decode; it is enough that it is answered and never with a 5xx."""


@dataclass(frozen=True)
class Encoding:
    """A photo as a file."""

    name: str
    data: bytes
    faithful: bool = True
    """Do the pixels differ so little that the captions must not?"""


@dataclass(frozen=True)
class ImageCase:
    name: str
    data: bytes
    statuses: frozenset[int]


@dataclass(frozen=True)
class RequestCase:
    name: str
    body: bytes
    statuses: frozenset[int]
    headers: tuple[tuple[str, str], ...] = ()
    method: str = "POST"
    path: str = "/predictions/{model}"
    raw_headers: bytes = field(default=b"", repr=False)
    """Header lines as they are, for what no HTTP library would send."""


# ---------------------------------------------------------------------------------------------------------- photos


def picture(width: int = 96, height: int = 64) -> Image.Image:
    """Shapes on a gradient with some noise, so that no file of it is trivially small."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=2)
    pixels = pixels + np.random.default_rng(0).integers(-20, 20, pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), fill=(220, 40, 40))
    return image


def encodings(photo: Image.Image) -> Iterator[Encoding]:
    """One RGB photo in every format, mode and way of saving that is served."""
    yield from _jpeg(photo)
    yield from _png(photo)
    plain: list[tuple[str, dict[str, Any]]] = [
        ("WEBP", {"quality": 90}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"quality": 85, "method": 0, "exif": _exif(1)}),
        ("TIFF", {}),
        *(("TIFF", {"compression": c}) for c in ("tiff_lzw", "tiff_adobe_deflate", "packbits")),
        ("TIFF", {"compression": "jpeg", "quality": 95}),
        ("TIFF", {"big_tiff": True}),
        ("BMP", {}),
    ]
    for file_format, options in plain:
        yield Encoding(_named(file_format, options), _saved(photo, file_format, **options))
    opaque = photo.convert("RGBA")
    for file_format in ("WEBP", "TIFF", "BMP"):
        options = {"lossless": True} if file_format == "WEBP" else {}
        yield Encoding(f"{file_format} RGBA", _saved(opaque, file_format, **options))
    for orientation in range(2, 9):
        turned = photo.transpose(_TURNED[orientation])
        for file_format in ("JPEG", "PNG", "WEBP", "TIFF"):
            options = {"JPEG": {"quality": 92}, "WEBP": {"quality": 92}}.get(file_format, {})
            data = _saved(turned, file_format, exif=_exif(orientation), **options)
            yield Encoding(f"{file_format} orientation {orientation}", data)
    frames = {"save_all": True, "append_images": [Image.new(photo.mode, photo.size, "blue")]}
    yield Encoding("WEBP animated", _saved(photo, "WEBP", lossless=True, **frames))
    yield Encoding("TIFF pages", _saved(photo, "TIFF", **frames))
    lab = ImageCms.profileToProfile(photo, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    assert lab is not None
    lab.info.clear()  # a colour profile that says when it was made
    yield Encoding("TIFF LAB", _saved(lab, "TIFF"))
    yield Encoding("TIFF tiled", tiff_tiled(photo))
    yield Encoding("TIFF big-endian", tiff_strips(photo, ">"))
    yield Encoding("TIFF many strips", tiff_strips(photo, "<", rows=1))
    yield Encoding("BMP top-down", bmp_top_down(photo))

    grey, palette = photo.convert("L"), photo.quantize(256)
    yield Encoding("GIF", _saved(palette, "GIF"), faithful=False)
    yield Encoding("GIF interlaced", _saved(palette, "GIF", interlace=1), faithful=False)
    yield Encoding("GIF animated", _saved(palette, "GIF", save_all=True, append_images=[palette.rotate(90)]), faithful=False)
    yield Encoding("GIF on a larger screen", gif_on_screen(palette, 400, 300), faithful=False)
    yield Encoding("BMP RLE8", bmp_rle8(grey), faithful=False)
    yield Encoding("TIFF F", _saved(grey.convert("F"), "TIFF"), faithful=False)
    yield Encoding("TIFF I;16", _saved(_sixteen_bits(grey), "TIFF"), faithful=False)
    yield Encoding("TIFF group 4", _saved(photo.convert("1"), "TIFF", compression="group4"), faithful=False)
    for mode in ("1", "L", "P"):
        for file_format in ("PNG", "BMP", "TIFF", *(("JPEG", "WEBP") if mode == "L" else ())):
            yield Encoding(f"{file_format} {mode}", _saved(palette if mode == "P" else photo.convert(mode), file_format), False)
    for file_format in ("PNG", "TIFF"):
        yield Encoding(f"{file_format} LA", _saved(photo.convert("LA"), file_format), faithful=False)


def _jpeg(photo: Image.Image) -> Iterator[Encoding]:
    for quality, subsampling, progressive in itertools.product((85, 90, 95, 100), (0, 1, 2), (False, True)):
        options: dict[str, Any] = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
        yield Encoding(_named("JPEG", options), _saved(photo, "JPEG", **options))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile[:24] + bytes(12) + profile[36:]  # without the time at which it was made
    for options in (
        {"icc_profile": profile},
        {"optimize": True},
        {"restart_marker_rows": 1},
        {"comment": b"a comment"},
        {"keep_rgb": True},
        {"exif": _exif(1)},
    ):
        yield Encoding(_named("JPEG", options), _saved(photo, "JPEG", quality=92, **options))
    yield Encoding("JPEG CMYK", _saved(photo.convert("CMYK"), "JPEG", quality=95))
    yield Encoding("MPO", _saved(photo, "MPO", quality=92, save_all=True, append_images=[photo.rotate(180)]))


def _png(photo: Image.Image) -> Iterator[Encoding]:
    yield Encoding("PNG", _saved(photo, "PNG"))
    yield Encoding("PNG uncompressed", _saved(photo, "PNG", compress_level=0))
    yield Encoding("PNG RGBA", _saved(photo.convert("RGBA"), "PNG"))
    pixels = np.asarray(photo)
    yield Encoding("PNG Adam7", png(pixels, interlaced=True))
    yield Encoding("PNG RGB 16 bits", png(pixels.astype(np.uint16) * 257))
    alpha = np.full((*pixels.shape[:2], 1), 65535, np.uint16)
    yield Encoding("PNG RGBA 16 bits", png(np.concatenate([pixels.astype(np.uint16) * 257, alpha], axis=2)))
    yield Encoding("PNG eXIf after the pixels", png(pixels, after=chunk(b"eXIf", _exif(1).tobytes()[6:])))
    yield Encoding("PNG I;16", _saved(_sixteen_bits(photo.convert("L")), "PNG"), faithful=False)


_T = Image.Transpose
_TURNED = {
    2: _T.FLIP_LEFT_RIGHT,
    3: _T.ROTATE_180,
    4: _T.FLIP_TOP_BOTTOM,
    5: _T.TRANSPOSE,
    6: _T.ROTATE_90,
    7: _T.TRANSVERSE,
    8: _T.ROTATE_270,
}
"""How a camera held otherwise stores an upright photo, for each EXIF orientation."""


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _named(file_format: str, options: dict[str, Any]) -> str:
    return " ".join([file_format, *(f"{k}={v}" if isinstance(v, int | str) else k for k, v in options.items())])


def _sixteen_bits(grey: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)


# -------------------------------------------------------------------------------- files that Pillow would not write


def chunk(name: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_header(width: int, height: int, *, depth: int = 8, colour: int = 0, interlaced: bool = False) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))


def png(pixels: np.ndarray, *, interlaced: bool = False, before: bytes = b"", after: bytes = b"") -> bytes:
    """pixels: (height, width, 3 or 4), uint8 or uint16. Adam7: https://www.w3.org/TR/png-3/#8Interlace"""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [pixels[y::dy, x::dx] for y, x, dy, dx in passes] if interlaced else [pixels]
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for part in parts if part.size for row in part)
    height, width, channels = pixels.shape
    header = png_header(width, height, depth=8 * pixels.itemsize, colour=2 if channels == 3 else 6, interlaced=interlaced)
    return header + before + chunk(b"IDAT", zlib.compress(rows)) + after + chunk(b"IEND", b"")


def tiff(entries: dict[int, tuple[int, list[int]]], data: bytes, order: str = "<") -> bytes:
    """A TIFF of one directory: tag to (type 3 or 4, values). Offsets are given relative to `data`."""
    magic = b"II*\0" if order == "<" else b"MM\0*"
    overflow, directory, start = b"", b"", 8 + len(data)
    after = start + 2 + 12 * len(entries) + 4
    for tag, (kind, values) in sorted(entries.items()):
        values = [8 + value for value in values] if tag in (273, 324) else values
        packed = struct.pack(order + ("H" if kind == 3 else "I") * len(values), *values)
        if len(packed) > 4:
            overflow, packed = overflow + packed, struct.pack(order + "I", after + len(overflow))
        directory += struct.pack(order + "HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    head = magic + struct.pack(order + "I", start)
    return head + data + struct.pack(order + "H", len(entries)) + directory + b"\0\0\0\0" + overflow


def _tiff_entries(width: int, height: int, *, compression: int = 1) -> dict[int, tuple[int, list[int]]]:
    return {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [8, 8, 8]),
        259: (3, [compression]),
        262: (3, [2]),
        277: (3, [3]),
    }


def tiff_strips(photo: Image.Image, order: str, rows: int = 8) -> bytes:
    width, height = photo.size
    starts = range(0, height, rows)
    sizes = [3 * width * min(rows, height - top) for top in starts]
    strips = {273: (4, [3 * width * top for top in starts]), 278: (4, [rows]), 279: (4, sizes)}
    return tiff(_tiff_entries(width, height) | strips, photo.tobytes(), order)


def tiff_tiled(photo: Image.Image, side: int = 64) -> bytes:
    width, height = photo.size
    boxes = [(x, y, x + side, y + side) for y in range(0, height, side) for x in range(0, width, side)]
    tiles = [zlib.compress(photo.crop(box).tobytes()) for box in boxes]
    starts = [sum(map(len, tiles[:i])) for i in range(len(tiles))]
    layout = {322: (4, [side]), 323: (4, [side]), 324: (4, starts), 325: (4, [len(tile) for tile in tiles])}
    return tiff(_tiff_entries(width, height, compression=8) | layout, b"".join(tiles))


def bmp_top_down(photo: Image.Image) -> bytes:
    height = photo.height
    bottom_up = bytearray(_saved(photo.transpose(_T.FLIP_TOP_BOTTOM), "BMP"))
    bottom_up[22:26] = struct.pack("<i", -height)
    return bytes(bottom_up)


def bmp_rle8(grey: Image.Image, rows: bytes | None = None, size: tuple[int, int] | None = None) -> bytes:
    """Run-length encoded; `rows` and `size` override what the picture gives."""
    width, height = size or grey.size
    if rows is None:
        lines = np.asarray(grey)[::-1]
        rows = b"".join(b"".join(bytes((1, value)) for value in line) + b"\0\0" for line in lines) + b"\0\1"
    table = b"".join(bytes((i, i, i, 0)) for i in range(256))
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    offset = 14 + len(info) + len(table)
    return b"BM" + struct.pack("<IHHI", offset + len(rows), 0, 0, offset) + info + table + rows


def gif_on_screen(palette: Image.Image, width: int, height: int) -> bytes:
    """The frame in the corner of a larger logical screen."""
    data = bytearray(_saved(palette, "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def webp_lossless_header(width: int, height: int) -> bytes:
    content = b"VP8L" + struct.pack("<I", 13) + b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + b"\0" * 9
    return b"RIFF" + struct.pack("<I", 4 + len(content)) + b"WEBP" + content


def jpeg_of_size(width: int, height: int) -> bytes:
    """A tiny JPEG whose header promises this size."""
    data = bytearray(_saved(Image.new("L", (8, 8)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_with_scans(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG that repeats its first scan."""
    data = _saved(Image.new("L", (width, height), "grey"), "JPEG", progressive=True)
    at = data.index(b"\xff\xda")
    end = data.index(b"\xff", at + 2)
    while data[end + 1] == 0:
        end = data.index(b"\xff", end + 2)
    refinement = data[at:end]
    return data[:end] + refinement * (scans - 1) + data[end:]


# ----------------------------------------------------------------------------------------------------------- images


def images() -> list[ImageCase]:
    """All image files with what may answer them."""
    return list(
        itertools.chain(_ordinary(), _cut_off(), _flipped(), _bombs(), _unserved(), _no_images(), _polyglots(), _metadata())
    )


def named_bombs() -> list[ImageCase]:
    """Files of a few bytes that expand to gigabytes, and that need an answer within milliseconds."""
    return [
        ImageCase("34 bytes of WebP, 9400 x 9400", webp_lossless_header(9400, 9400)[:34], TOO_LARGE),
        ImageCase("JPEG of 13000 x 13000", jpeg_of_size(13000, 13000), TOO_LARGE),
        ImageCase("74 bytes of PNG, 1 x 178 million", _png_bomb(1, 178_000_000), TOO_LARGE),
    ]


def _ordinary() -> Iterator[ImageCase]:
    for encoding in encodings(picture()):
        yield ImageCase(encoding.name, encoding.data, GOOD)
    for width, height in ((1, 1), (1, 500), (500, 1), (3, 5000), (16_000, 1), (1, 16_000)):
        for file_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
            if max(width, height) <= 16_000:
                image = Image.new("RGB", (width, height), "teal")
                yield ImageCase(f"{file_format} {width} x {height}", _saved(image, file_format), GOOD)
    clear = picture().convert("RGBA")
    clear.putalpha(0)
    for file_format in ("PNG", "WEBP", "GIF", "TIFF"):
        yield ImageCase(f"{file_format} all transparent", _saved(clear, file_format), GOOD)
    yield ImageCase("PNG 49 megapixels", _saved(Image.new("L", (7000, 7000)), "PNG", compress_level=1), GOOD)


def _cut_off() -> Iterator[ImageCase]:
    for encoding in encodings(picture()):
        if "animated" in encoding.name or encoding.name in ("TIFF pages", "MPO"):  # half of the file has the first frame
            continue
        for share, expected in ((0.02, DAMAGED), (0.3, DAMAGED), (0.5, DAMAGED), (0.95, ANSWERED)):
            yield ImageCase(f"{encoding.name}, {share:.0%} of it", encoding.data[: int(len(encoding.data) * share)], expected)


def _flipped() -> Iterator[ImageCase]:
    """Bits flipped anywhere, in the first bytes, and runs of bytes overwritten."""
    chance = random.Random(0)
    for encoding in encodings(picture()):
        for kind, span, times in (("flipped bits", None, 20), ("a damaged header", 64, 4)):
            data = bytearray(encoding.data)
            for _ in range(times):
                data[chance.randrange(min(len(data), span or len(data)))] ^= 1 << chance.randrange(8)
            yield ImageCase(f"{encoding.name}, {kind}", bytes(data), ANSWERED)
        data, at = bytearray(encoding.data), chance.randrange(len(encoding.data))
        data[at : at + 16] = chance.randbytes(16)
        yield ImageCase(f"{encoding.name}, overwritten", bytes(data), ANSWERED)


def _png_bomb(width: int, height: int) -> bytes:
    content = zlib.compress(b"\0" * 20_000)[:17]
    return png_header(width, height) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def _bombs() -> Iterator[ImageCase]:
    yield from named_bombs()
    sides = ((16_001, 1), (1, 16_001), (7_072, 7_072), (16_000, 16_000), (65_535, 65_535))
    for width, height in sides:
        yield ImageCase(f"PNG bomb {width} x {height}", _png_bomb(width, height), TOO_LARGE)
        yield ImageCase(f"JPEG bomb {width} x {height}", jpeg_of_size(width, height), TOO_LARGE)
        yield ImageCase(f"GIF bomb {width} x {height}", gif_on_screen(picture().quantize(16), width, height), TOO_LARGE)
        yield ImageCase(f"BMP bomb {width} x {height}", bmp_rle8(picture().convert("L"), b"\0\1", (width, height)), TOO_LARGE)
        strip = {273: (4, [0]), 278: (4, [height]), 279: (4, [100])}
        entries = _tiff_entries(width, height, compression=8) | strip
        yield ImageCase(f"TIFF bomb {width} x {height}", tiff(entries, zlib.compress(b"\0" * 50_000)), TOO_LARGE)
        if max(width, height) <= 16_383:
            yield ImageCase(f"WebP bomb {width} x {height}", webp_lossless_header(width, height), TOO_LARGE)
    for width, height in ((2**31 - 1, 2**31 - 1), (2**32 - 1, 1), (2**31, 2**31)):
        yield ImageCase(f"PNG of {width} x {height}", _png_bomb(width, height), CLIENT_ERROR)
    yield ImageCase("BMP of -2**31 rows", bmp_rle8(picture().convert("L"), b"\0\1", (100, -(2**31))), CLIENT_ERROR)
    yield ImageCase("PNG without pixels", png_header(0, 0) + chunk(b"IEND", b""), DAMAGED)

    frame = bytearray(_saved(picture().quantize(16), "GIF"))
    at = frame.index(b",\0\0\0\0") + 5
    frame[at : at + 4] = struct.pack("<HH", 65_535, 65_535)
    yield ImageCase("GIF with a frame larger than its screen", bytes(frame), TOO_LARGE)
    tile = {322: (4, [2**20]), 323: (4, [2**10]), 324: (4, [0]), 325: (4, [50_000])}
    yield ImageCase(
        "TIFF with a tile of a gigapixel",
        tiff(_tiff_entries(100, 100, compression=8) | tile, zlib.compress(b"\0" * 3 * 2**24)),
        CLIENT_ERROR,
    )
    yield ImageCase("JPEG of 5000 scans", jpeg_with_scans(2000, 2000, 5000), TOO_LARGE)
    lines = bmp_rle8(picture().convert("L"), b"\0\0" * 1000 + b"\0\1", (7000, 7000))
    yield ImageCase("BMP of 49 megapixels in 2 kB", lines, ANSWERED)
    jumps = bmp_rle8(picture().convert("L"), b"\0\2\0\0" * 100_000 + b"\0\1", (7000, 7000))
    yield ImageCase("BMP that jumps nowhere 100,000 times", jumps, ANSWERED)
    yield ImageCase("more than 20 MiB", _saved(picture(), "PNG") + b"\0" * (20 * 2**20), TOO_LARGE)


def _unserved() -> Iterator[ImageCase]:
    for name, data in {
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
        "SVG with a document type": b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x "y">]><svg>&x;</svg>',
        "SVG that reads a file": b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
        "PSD": b"8BPS\0\1" + b"\0" * 100,
        "PDF": b"%PDF-1.7\n1 0 obj\n",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "ICO": _saved(picture(32, 32), "ICO"),
        "JPEG 2000": _saved(picture(), "JPEG2000"),
        "JPEG 2000 code stream": b"\xff\x4f\xff\x51" + b"\0" * 50,
        "JPEG XL": b"\xff\x0a" + b"\0" * 50,
        "JPEG XL container": b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0" * 50,
        "OpenEXR": b"\x76\x2f\x31\x01" + b"\0" * 50,
        "Radiance": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n",
        "DDS": _saved(picture(), "DDS"),
        "QOI": b"qoif" + struct.pack(">IIBB", 10, 10, 3, 0),
        "ICNS": _saved(picture(32, 32), "ICNS"),
        "XCF": b"gimp xcf v011\0" + b"\0" * 50,
        "IFF": b"FORM\0\0\0\x20ILBM",
        "AVIF": b"\0\0\0\x20ftypavif" + b"\0" * 50,
        "HEIC": b"\0\0\0\x20ftypheic" + b"\0" * 50,
        **{f"Netpbm P{n}": f"P{n} 2 2 255 ".encode() + b"\1" * 12 for n in range(1, 7)},
    }.items():
        yield ImageCase(name, data, UNSERVED)


def _no_images() -> Iterator[ImageCase]:
    chance = random.Random(1)
    photo = _saved(picture(), "JPEG")
    for name, data in {
        "one byte": b"\0",
        "text": b"hello, world",
        "UTF-16": "hello".encode("utf-16"),
        "HTML": b"<!doctype html><img src=x onerror=alert(1)>",
        "XML": b"<?xml version='1.0'?><a/>",
        "zip": b"PK\3\4" + bytes(100),
        "ELF": b"\x7fELF\2\1\1" + bytes(100),
        "gzip of a JPEG": gzip.compress(photo, mtime=0),
        "base64 of a JPEG": base64.b64encode(photo),
        "a data URI": b"data:image/jpeg;base64," + base64.b64encode(photo),
        "a URL": b"http://169.254.169.254/latest/meta-data/",
        "a path": b"/etc/passwd",
        "a pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "a JPEG after a byte": b"\0" + photo,
        "a JPEG backwards": photo[::-1],
        "line ends changed": _saved(picture(), "PNG").replace(b"\r\n", b"\n"),
        **{f"{n} zeros": bytes(n) for n in (10, 1000, 100_000)},
        **{f"{n} random bytes": b"\x01" + chance.randbytes(n) for n in (10, 1000, 100_000, 1_000_000)},
    }.items():
        yield ImageCase(name, data, DAMAGED)
    for name, signature in {
        "JPEG": b"\xff\xd8\xff\xe0",
        "PNG": b"\x89PNG\r\n\x1a\n",
        "WebP": b"RIFF\xff\0\0\0WEBPVP8 ",
        "GIF": b"GIF89a",
        "BMP": b"BM",
        "TIFF": b"II*\0",
        "BigTIFF": b"II+\0\x08\0\0\0",
    }.items():
        yield ImageCase(f"{name}'s signature alone", signature, DAMAGED)
        for n in (30, 3000):
            yield ImageCase(f"{name}'s signature and {n} random bytes", signature + chance.randbytes(n), CLIENT_ERROR)
            yield ImageCase(f"{name}'s signature and {n} bytes of 0xff", signature + b"\xff" * n, CLIENT_ERROR)


def _polyglots() -> Iterator[ImageCase]:
    jpeg, png_file = _saved(picture(), "JPEG"), _saved(picture(), "PNG")
    for name, tail in {
        "zip": b"PK\3\4" + bytes(50),
        "PHP": b"<?php system($_GET['c']); ?>",
        "HTML": b"<script>alert(1)</script>",
        "PDF": b"%PDF-1.7",
        "another image": _saved(picture(), "GIF"),
        "a megabyte of zeros": bytes(2**20),
    }.items():
        yield ImageCase(f"JPEG and {name}", jpeg + tail, GOOD)
        yield ImageCase(f"PNG and {name}", png_file + tail, GOOD)
        yield ImageCase(f"GIF and {name}", _saved(picture(), "GIF") + tail, GOOD)
    yield ImageCase(
        "JPEG with a script as comment", _saved(picture(), "JPEG", comment=b"*/=1;alert(1)/*\r\n\r\nGET / HTTP/1.1"), GOOD
    )
    yield ImageCase("GIF that is JavaScript", b"GIF89a/*" + b"\0" * 20 + b"*/=1;alert(1)//", CLIENT_ERROR)
    yield ImageCase("PDF that holds a JPEG", b"%PDF-1.4\n" + jpeg, UNSERVED)
    yield ImageCase("a WebP in an AVI", b"RIFF\x20\0\0\0AVI " + b"\0" * 30, DAMAGED)


def _metadata() -> Iterator[ImageCase]:
    """What stands beside the pixels."""
    pixels = np.asarray(picture())
    bomb = zlib.compress(bytes(2**26), 9)
    yield ImageCase("PNG with a colour profile of 64 MiB", png(pixels, before=chunk(b"iCCP", b"x\0\0" + bomb)), ANSWERED)
    yield ImageCase("PNG with a text of 64 MiB", png(pixels, before=chunk(b"zTXt", b"x\0\0" + bomb)), ANSWERED)
    texts = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2**20 - 1), 9)) * 100
    yield ImageCase("PNG with 100 texts of a MiB", png(pixels, before=texts), ANSWERED)
    yield ImageCase("PNG with 50,000 chunks", png(pixels, before=chunk(b"teSt", b"") * 50_000), ANSWERED)
    yield ImageCase("PNG with a chunk of 4 GiB", png_header(9, 9) + b"\xff\xff\xff\xffIDAT" + bytes(50), DAMAGED)
    yield ImageCase("PNG with EXIF that is none", png(pixels, after=chunk(b"eXIf", b"\xff" * 100)), GOOD)
    jpeg = _saved(picture(), "JPEG")
    yield ImageCase("JPEG with 50,000 comments", jpeg[:2] + b"\xff\xfe\0\2" * 50_000 + jpeg[2:], ANSWERED)
    yield ImageCase("JPEG with EXIF that is none", _saved(picture(), "JPEG", exif=b"Exif\0\0" + b"\xff" * 100), GOOD)
    for value in (0, 9, 65_535):
        yield ImageCase(f"JPEG of orientation {value}", _saved(picture(), "JPEG", exif=_exif(value)), GOOD)
    loop = b"Exif\0\0II*\0\x08\0\0\0\0\0" + struct.pack("<I", 8)
    yield ImageCase("JPEG with EXIF that points at itself", _saved(picture(), "JPEG", exif=loop), GOOD)
    yield ImageCase("JPEG with a broken colour profile", _saved(picture(), "JPEG", icc_profile=b"\xff" * 200), GOOD)
    comment = b"!\xfe" + (b"\xff" + b"x" * 255) * 2000 + b"\0"
    gif = _saved(picture().quantize(16), "GIF")
    at = gif.index(b",\0\0\0\0")
    yield ImageCase("GIF with a comment of 500 kB", gif[:at] + comment + gif[at:], ANSWERED)
    own = tiff(_tiff_entries(9, 9) | {273: (4, [0]), 278: (4, [9]), 279: (4, [243])}, bytes(243))
    first = struct.unpack("<I", own[4:8])[0]
    link = first + 2 + 12 * struct.unpack("<H", own[first : first + 2])[0]
    looped = own[:link] + own[4:8] + own[link + 4 :]
    yield ImageCase("TIFF whose next page is the first", looped, GOOD)
    many = _tiff_entries(9, 9) | {273: (4, [0]), 278: (4, [9]), 279: (4, [243])} | {t: (3, [1]) for t in range(40_000, 60_000)}
    yield ImageCase("TIFF with 20,000 tags", tiff(many, bytes(243)), ANSWERED)
    yield ImageCase("TIFF with an offset beyond the end", b"II*\0\xff\xff\xff\x7f" + bytes(20), DAMAGED)


# --------------------------------------------------------------------------------------------------------- requests


def multipart(*parts: tuple[str, bytes], boundary: str = "frontier") -> bytes:
    """Parts: the header lines of each, and its content."""
    body = b"".join(f"--{boundary}\r\n{lines}\r\n\r\n".encode() + content + b"\r\n" for lines, content in parts)
    return body + f"--{boundary}--\r\n".encode()


FORM = (("Content-Type", "multipart/form-data; boundary=frontier"),)
JSON = (("Content-Type", "application/json"),)


def file_part(
    content: bytes, name: str = "image", file_name: str | None = "a.jpg", kind: str | None = "image/jpeg"
) -> tuple[str, bytes]:
    lines = f'Content-Disposition: form-data; name="{name}"'
    lines += "" if file_name is None else f'; filename="{file_name}"'
    return lines + ("" if kind is None else f"\r\nContent-Type: {kind}"), content


def requests() -> list[RequestCase]:
    """Whole requests. An answer of TorchServe itself (a bare 400, 404, 405, 413) is an answer."""
    return list(itertools.chain(_bodies(), _forms(), _json_bodies(), _headers(), _methods_and_paths()))


def _bodies() -> Iterator[RequestCase]:
    photo = _saved(picture(), "JPEG")
    for kind in (
        "image/jpeg",
        "image/png",
        "application/octet-stream",
        "application/x-www-form-urlencoded",
        "text/plain",
        "text/html; charset=utf-16",
        "nonsense",
        "",
        ";;;",
        "image/jpeg; charset=utf-8; boundary=x",
        "a/" + "b" * 1000,
    ):
        expected = ANSWERED if kind.startswith(("text/", ";")) else GOOD  # curl sends x-www-form-urlencoded unasked
        yield RequestCase(f"raw body as {kind[:30] or 'nothing'}", photo, expected, (("Content-Type", kind),) if kind else ())
    yield RequestCase("no body", b"", DAMAGED)
    yield RequestCase("a photo as JSON", photo, DAMAGED, JSON)
    yield RequestCase("a photo as a form", photo, DAMAGED, FORM)
    yield RequestCase(
        "a form field instead of a photo",
        b"image=abc&beam_size=3",
        DAMAGED,
        (("Content-Type", "application/x-www-form-urlencoded"),),
    )
    yield RequestCase(
        "100,000 form fields",
        b"&".join(b"a%d=1" % i for i in range(100_000)),
        CLIENT_ERROR,
        (("Content-Type", "application/x-www-form-urlencoded"),),
    )


def _forms() -> Iterator[RequestCase]:
    photo = _saved(picture(), "JPEG")
    field = 'Content-Disposition: form-data; name="{}"'.format
    for name, parts, expected in (
        ("a usual form", [file_part(photo)], GOOD),
        ("a form with parameters", [file_part(photo), (field("beam_size"), b"3"), (field("max_length"), b"5")], GOOD),
        ("no file name", [file_part(photo, file_name=None)], GOOD),
        ("an empty file name", [file_part(photo, file_name="")], ANSWERED),
        ("no content type", [file_part(photo, kind=None)], GOOD),
        ("a file name with a path", [file_part(photo, file_name="../../etc/passwd")], GOOD),
        ("a file name with a null byte", [file_part(photo, file_name="a\0.jpg")], ANSWERED),
        ("a file name of 10,000 letters", [file_part(photo, file_name="a" * 10_000)], ANSWERED),
        ("a file name in Chinese", [file_part(photo, file_name="狗.jpg")], GOOD),
        ("a text part as the image", [file_part(b"hello", kind="text/plain")], DAMAGED),
        ("a JSON part as the image", [file_part(b'{"a": 1}', kind="application/json")], DAMAGED),
        ("deep JSON as the image", [file_part(b"[" * 100_000, kind="application/json")], DAMAGED),
        ("two images", [file_part(photo), file_part(photo, name="file")], DAMAGED),
        ("the same field twice", [file_part(photo), file_part(photo)], ANSWERED),
        ("no image field", [(field("beam_size"), b"3")], DAMAGED),
        ("an unknown field", [file_part(photo), (field("temperature"), b"1")], DAMAGED),
        ("a field name of 100,000 letters", [file_part(photo), (field("a" * 100_000), b"1")], CLIENT_ERROR),
        ("an empty field name", [file_part(photo), (field(""), b"1")], ANSWERED),
        ("a field name with a line break", [file_part(photo), (field("a\\r\\nb"), b"1")], CLIENT_ERROR),
        ("a field named like a header", [file_part(photo), (field("Content-Type"), b"1")], CLIENT_ERROR),
        ("a parameter that is no text", [file_part(photo), (field("beam_size"), b"\xff\xfe")], DAMAGED),
        ("a parameter of a megabyte", [file_part(photo), (field("beam_size"), b"1" * 2**20)], DAMAGED),
        ("a parameter that is NaN", [file_part(photo), (field("length_penalty"), b"nan")], DAMAGED),
        ("a parameter that is infinite", [file_part(photo), (field("beam_size"), b"1e999")], DAMAGED),
        ("20,000 fields", [file_part(photo), *((field(f"f{i}"), b"1") for i in range(20_000))], CLIENT_ERROR),
        ("1000 fields", [file_part(photo), *((field(f"f{i}"), b"1") for i in range(1000))], CLIENT_ERROR),
        ("nothing but an end", [], DAMAGED),
    ):  # fmt: skip
        yield RequestCase(f"form: {name}", multipart(*parts), expected, FORM)
    whole = multipart(file_part(photo))
    yield RequestCase("form: cut off", whole[: len(whole) // 2], DAMAGED, FORM)
    yield RequestCase("form: another boundary", whole, DAMAGED, (("Content-Type", "multipart/form-data; boundary=other"),))
    yield RequestCase("form: no boundary", whole, DAMAGED, (("Content-Type", "multipart/form-data"),))
    yield RequestCase("form: line feeds alone", whole.replace(b"\r\n", b"\n"), ANSWERED, FORM)
    yield RequestCase("form: mixed", whole, ANSWERED, (("Content-Type", "multipart/mixed; boundary=frontier"),))
    yield RequestCase(
        "form: base64 transfer encoding",
        multipart((file_part(b"")[0] + "\r\nContent-Transfer-Encoding: base64", base64.b64encode(photo))),
        ANSWERED,
        FORM,
    )
    yield RequestCase("form: unknown charset", multipart((file_part(b"")[0] + "; charset=nonsense", photo)), ANSWERED, FORM)


def _json_bodies() -> Iterator[RequestCase]:
    text = base64.b64encode(_saved(picture(), "JPEG")).decode()
    small = base64.b64encode(b"no image").decode()
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [text]}
    for name, content, expected in (
        ("an image", {"image": text}, GOOD),
        ("a data URI", {"image": f"data:image/jpeg;base64,{text}"}, GOOD),
        ("instances", {"instances": [text, {"b64": text}]}, GOOD),
        ("one bad instance", {"instances": [text, small]}, GOOD),
        ("a tensor", {"inputs": [tensor]}, GOOD),
        ("a tensor of another shape", {"inputs": [tensor | {"shape": [10**9]}]}, DAMAGED),
        ("a tensor of another type", {"inputs": [tensor | {"datatype": "FP32"}]}, DAMAGED),
        ("a list", [text], DAMAGED),
        ("a number", 1, DAMAGED),
        ("null", None, DAMAGED),
        ("no image", {}, DAMAGED),
        ("an image that is a number", {"image": 1}, DAMAGED),
        ("an image in an image", {"image": {"image": {"image": text}}}, DAMAGED),
        ("a URL", {"image": "http://127.0.0.1:8081/models"}, DAMAGED),
        ("a file URL", {"image": "file:///etc/passwd"}, DAMAGED),
        ("an SVG data URI", {"image": "data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode()}, UNSERVED),
        ("a data URI that is no base64", {"image": "data:image/svg+xml,<svg/>"}, DAMAGED),
        ("broken base64", {"image": text[:-3] + "!"}, DAMAGED),
        ("base64 with half a surrogate", {"image": "\ud800"}, DAMAGED),
        ("no instances", {"instances": []}, DAMAGED),
        ("33 instances", {"instances": [small] * 33}, DAMAGED),
        ("100,000 instances", {"instances": [""] * 100_000}, DAMAGED),
        ("parameters of the wrong type", {"image": text, "parameters": [1]}, DAMAGED),
        ("a parameter out of range", {"image": text, "parameters": {"beam_size": 10**6}}, DAMAGED),
        ("a parameter that is true", {"image": text, "parameters": {"beam_size": True}}, DAMAGED),
        ("a parameter beyond floats", {"image": text, "parameters": {"beam_size": 10**400}}, DAMAGED),
        ("an unknown key", {"image": text, "__class__": "os.system"}, DAMAGED),
        ("100,000 keys", {"image": text} | {str(i): i for i in range(100_000)}, DAMAGED),
    ):  # fmt: skip
        yield RequestCase(f"JSON: {name}", json.dumps(content).encode(), expected, JSON)
    for name, body, expected in (
        ("broken", b'{"image":', DAMAGED),
        ("100,000 lists deep", b"[" * 100_000 + b"]" * 100_000, DAMAGED),
        ("100,000 objects deep", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, DAMAGED),
        ("a number of 100,000 digits", b'{"image": ' + b"1" * 100_000 + b"}", DAMAGED),
        ("NaN", b'{"image": NaN}', DAMAGED),
        ("ten million lists", b"[" + b"[]," * 10_000_000 + b"[]]", DAMAGED),
        ("not UTF-8", b'{"image": "\xff\xfe"}', DAMAGED),
        ("UTF-16", json.dumps({"image": text}).encode("utf-16"), ANSWERED),
        ("a byte order mark", b"\xef\xbb\xbf" + json.dumps({"image": text}).encode(), ANSWERED),
        ("the same key twice", f'{{"image": "", "image": "{text}"}}'.encode(), ANSWERED),
        ("10 MiB of spaces", b" " * (10 * 2**20), DAMAGED),
        ("YAML", b"image: !!python/object/apply:os.system [id]", DAMAGED),
    ):
        yield RequestCase(f"JSON: {name}", body, expected, JSON)


def _headers() -> Iterator[RequestCase]:
    photo = _saved(picture(), "JPEG")
    for name, value in (
        ("describe", "True"),
        ("describe", "true"),
        ("explain", "True"),
        ("X-Request-Id", "a" * 1000),
        ("X-Request-Id", "%0d%0aSet-Cookie:x"),
        ("X-Request-Id-Prefix", "[METRICS]x"),
        ("X-Request-Id-Prefix", "a" * 5000),
        ("Accept", "text/html"),
        ("Accept-Encoding", "gzip, br"),
        ("Expect", "nonsense"),
        ("Host", "evil.example"),
        ("X-Forwarded-For", "127.0.0.1"),
        ("Authorization", "Bearer x"),
        ("Range", "bytes=0-1"),
        ("Upgrade", "h2c"),
        ("Connection", "Upgrade, HTTP2-Settings"),
        ("Content-Encoding", "gzip"),
        ("Transfer-Encoding", "identity"),
    ):
        expected = ANSWERED | {417} if name in ("Expect", "Transfer-Encoding", "Host") else GOOD
        yield RequestCase(f"header {name}: {value[:20]}", photo, expected, ((name, value),))
    refused = CLIENT_ERROR | {404, 405, 414, 431}
    for name, line, expected in (
        ("invalid UTF-8", b"X-Odd: \xff\xfe\x80\r\n", ANSWERED),
        ("a request id of invalid UTF-8", b"X-Request-Id-Prefix: \xe9\xff\r\n", ANSWERED),
        ("a request id with a vertical tab", b"X-Request-Id: a\x0bb\r\n", ANSWERED),
        ("a null byte", b"X-Odd: a\0b\r\n", ANSWERED),
        ("a folded line", b"X-Odd: a\r\n b\r\n", ANSWERED),
        ("a carriage return alone", b"X-Odd: a\rb: c\r\n", ANSWERED),
        ("no colon", b"nonsense\r\n", ANSWERED),
        ("a space before the colon", b"X-Odd : a\r\n", ANSWERED),
        ("16 KiB", b"X-Odd: " + b"a" * 2**14 + b"\r\n", ANSWERED | refused),
        ("1000 headers", b"".join(b"X-%d: a\r\n" % i for i in range(400)), ANSWERED | refused),
        ("content length twice", b"Content-Length: 3\r\n", ANSWERED | refused),
        ("content length and chunks", b"Transfer-Encoding: chunked\r\n", ANSWERED | refused),
        ("a negative content length", b"Content-Length: -1\r\n", ANSWERED | refused),
    ):
        yield RequestCase(f"header line: {name}", photo, expected, raw_headers=line)


def _methods_and_paths() -> Iterator[RequestCase]:
    photo = _saved(picture(), "JPEG")
    refused = frozenset({400, 404, 405, 414})
    for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "NONSENSE"):
        yield RequestCase(f"{method} with a photo", photo, GOOD | refused | {501}, method=method)
        yield RequestCase(f"{method} with nothing", b"", GOOD | refused | {501}, method=method)
    for path in (
        "/predictions/{model}/99.9",
        "/predictions/nothing",
        "/predictions/",
        "/predictions",
        "/predictions/{model}/1.0/more",
        "/predictions/%2e%2e/models",
        "/predictions/..%2f..%2fmodels",
        "/predictions/{model}%00",
        "/predictions/%ff%fe",
        "/models",
        "/models/{model}",
        "/workflows",
        "/wfpredict/{model}",
        "/v2/models/{model}/unload",
        "/api-description",
        "/nothing",
        "//predictions/{model}",
        "/" + "a" * 3000,
        "/" + "a" * 10_000,
    ):
        yield RequestCase(f"POST {path[:40]}", photo, ANSWERED | refused, path=path)
    for name, query, expected in (
        ("parameters", "beam_size=2", GOOD),
        ("a bad parameter", "beam_size=x", DAMAGED),
        ("an unknown parameter", "x=1", DAMAGED),
        ("3000 letters", "language=" + "a" * 3000, DAMAGED | refused),
        ("20,000 letters", "x=" + "a" * 20_000, refused | {413, 431}),
        ("an image", "image=abc", DAMAGED),
        ("bad escapes", "beam_size=%zz", refused),
        ("a line break", "beam_size=%0d%0aX:1", DAMAGED),
    ):
        yield RequestCase(f"query: {name}", photo, expected, (("Content-Type", "image/jpeg"),), path=f"/invocations?{query}")
    for path in ("/explanations/{model}", "/models/{model}/invoke", "/v1/models/{model}:predict", "/v2/models/{model}/infer"):
        yield RequestCase(f"photo to {path}", photo, ANSWERED | refused, path=path)


def main() -> None:
    """Write the image files to a folder, with a list of the statuses that may answer them."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    listing = []
    for number, case in enumerate(images()):
        (folder / f"{number:04}.bin").write_bytes(case.data)
        listing.append({"file": f"{number:04}.bin", "name": case.name, "statuses": sorted(case.statuses)})
    (folder / "corpus.json").write_text(json.dumps(listing, indent=1))


if __name__ == "__main__":
    main()
