"""Every file of the corpus through the decoder, as the worker uses it; then files that nobody thought of."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, WebPImagePlugin

from handler.checkpoint import Checkpoint
from handler.config import DecodingConfig, ImageLimits, PreprocessingConfig, ServingConfig
from handler.contract import RequestParser, error_answer
from handler.errors import ImageTooLarge, InvalidRequest, RequestError
from handler.isolation import FittedImage, ImageReader
from handler.parameters import Parameters
from tests.conftest import SAMPLES
from tests.corpus import encodings, images, named_bombs, picture

# pytest makes errors of warnings; the service ignores Pillow's, which are about damaged metadata.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

FILES = [encoding.data for encoding in encodings(picture())]


@pytest.fixture(scope="module")
def reader() -> Iterator[ImageReader]:
    reader = ImageReader(ImageLimits(), PreprocessingConfig(), DecodingConfig())
    reader.start()
    yield reader
    reader.close()


def status(reader: ImageReader, data: bytes) -> int:
    """The status that answers these bytes. Any other exception than a RequestError is a 500 and fails the test."""
    try:
        image = reader.read(data)
    except RequestError as error:
        assert error.message
        return error.status
    assert image.pixels.shape == (224, 224, 3)
    return 200


def test_every_file_has_its_status_and_none_breaks_the_decoder(reader: ImageReader) -> None:
    cases = images()
    assert len(cases) > 1000
    assert len({case.name for case in cases}) == len(cases)
    child = reader._child
    found = [(case.name, status(reader, case.data), sorted(case.statuses)) for case in cases]
    assert [one for one in found if one[1] not in one[2]] == []
    assert reader._child is child, "a file ended the decoder's process"


def test_the_corpus_is_the_same_every_time() -> None:
    once, again = images(), images()
    assert [(case.name, case.data) for case in once] == [(case.name, case.data) for case in again]


@pytest.mark.parametrize("bomb", named_bombs(), ids=lambda case: case.name)
def test_bombs_are_refused_by_their_header(reader: ImageReader, bomb: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("pixels were decoded"))
    monkeypatch.setattr(WebPImagePlugin._webp, "WebPAnimDecoder", lambda _: pytest.fail("a canvas was allocated"))
    with pytest.raises(ImageTooLarge, match="limit"):
        reader.read(bomb.data)  # type: ignore[attr-defined]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.stem)
def test_one_photo_in_all_encodings_is_the_same_picture(reader: ImageReader, sample: object) -> None:
    with Image.open(sample) as image:  # type: ignore[arg-type]
        photo = image.convert("RGB")
    photo.thumbnail((640, 640))
    faithful = [encoding for encoding in encodings(photo) if encoding.faithful]
    assert len(faithful) >= 50
    wanted = reader.read(next(e.data for e in faithful if e.name == "PNG"))
    far = {e.name: round(distance(reader.read(e.data), wanted), 1) for e in faithful}
    assert {name: d for name, d in far.items() if d > 4} == {}


def distance(one: FittedImage, other: FittedImage) -> float:
    """Mean difference of the pixels, of 255. An upright photo beside the same upside down has some 50."""
    assert (one.width, one.height) == (other.width, other.height)
    return float(np.abs(one.pixels.astype(int) - other.pixels).mean())


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file of the corpus with up to six wounds: bytes changed, dropped, doubled, or another file's in their place."""
    data = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(1, 6))):
        # most of what a decoder believes stands at the beginning
        at = draw(st.integers(0, min(len(data), draw(st.sampled_from((32, 256, 10**6))))))
        length = draw(st.sampled_from((1, 2, 4, 16, 256)))
        wound = draw(st.sampled_from(("bytes", "extreme", "drop", "double", "graft")))
        if wound == "bytes":
            data[at : at + length] = random.Random(draw(st.integers(0, 2**32))).randbytes(length)
        elif wound == "extreme":
            data[at : at + length] = draw(st.sampled_from((b"\0", b"\xff", b"\x7f", b"\x80"))) * length
        elif wound == "drop":
            del data[at : at + length]
        elif wound == "double":
            data[at:at] = data[at : at + length] * draw(st.sampled_from((1, 2, 1000)))
        else:
            data[at:] = draw(st.sampled_from(FILES))[at:]
    return bytes(data)


@settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "400")))
@given(data=damaged() | st.binary(max_size=200))
def test_no_damage_gives_anything_but_a_picture_or_a_clear_refusal(reader: ImageReader, data: bytes) -> None:
    assert status(reader, data) in {200, 400, 413, 415}


def test_memory_stays_with_the_child_and_within_its_limit(reader: ImageReader) -> None:
    """Fifty megapixels at a time, over and over: the worker's own memory does not follow."""
    file = next(case.data for case in images() if case.name == "PNG 49 megapixels")
    reader.read(file)
    before = psutil.Process().memory_info().rss
    for _ in range(4):
        reader.read(file)
    assert psutil.Process().memory_info().rss - before < 20 * 2**20
    assert reader._child is not None
    assert psutil.Process(reader._child.process.pid).memory_info().rss < DecodingConfig().memory_mib * 2**20


def test_the_child_keeps_the_memory_of_a_photo_for_the_next(reader: ImageReader) -> None:
    """Of a phone's photo it would take and give back some 1,700 pages each time, for a fifth of the time."""
    buffer = io.BytesIO()
    Image.new("RGB", (4032, 3024), "teal").save(buffer, "JPEG")
    for _ in range(3):
        reader.read(buffer.getvalue())
    assert reader._child is not None
    before = page_faults(reader._child.process.pid)
    for _ in range(3):
        reader.read(buffer.getvalue())
    assert page_faults(reader._child.process.pid) - before < 300


def page_faults(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def test_a_file_that_takes_too_long_is_refused_and_the_next_one_is_not(reader: ImageReader) -> None:
    slow = next(case.data for case in images() if case.name == "PNG 49 megapixels")
    with pytest.raises(ImageTooLarge, match="seconds"):
        reader.read(slow, 0.001)
    assert status(reader, FILES[0]) == 200
    assert status(reader, slow) == 200


NAMES = "image instances inputs parameters b64 data body file id outputs name shape datatype"
KEYS = st.sampled_from([*NAMES.split(), *Parameters.model_fields])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("QUJD"),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS | st.text(max_size=10), inner, max_size=5),
    max_leaves=20,
)
FIELDS = st.dictionaries(KEYS | st.text(max_size=10), st.binary(max_size=50) | st.text(max_size=20) | JSON, max_size=4)


@settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "400")))
@given(
    fields=FIELDS | JSON.map(lambda body: {"body": json.dumps(body).encode()}) | st.binary().map(lambda b: {"body": b}),
    kind=st.sampled_from((None, "", "image/png", "application/json", "multipart/form-data; boundary=x", "text/plain")),
)
def test_no_request_gives_anything_but_images_or_a_clear_refusal(
    checkpoint: Checkpoint, fields: dict[str, object], kind: str | None
) -> None:
    parser = RequestParser(checkpoint.config, ServingConfig())
    try:
        request = parser.parse(fields, kind)
    except RequestError as error:
        assert error.message
        assert len(error.message) < 1000
        assert error_answer(error)[0] == error.status
    else:
        assert 1 <= len(request.images) <= 32
        assert all(isinstance(image, bytes | RequestError) for image in request.images)


def test_a_body_of_millions_of_values_is_refused_before_it_is_parsed(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(InvalidRequest, match="10,000 values"):
        RequestParser(checkpoint.config, ServingConfig()).parse({"body": b"[" + b"[]," * 10**6 + b"[]]"}, "application/json")
