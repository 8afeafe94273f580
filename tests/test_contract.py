"""Every form of request and answer, without HTTP."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.captioner import Caption, CaptionedImage, PreparedImage
from handler.config import DecoderConfig, ImageLimits, ModelConfig, ServingConfig
from handler.contract import CaptionRequest, ModelInfo, RequestParser, answer, error_answer
from handler.errors import (
    CaptionError,
    ImageTooLarge,
    InvalidImage,
    InvalidParameter,
    InvalidRequest,
    MissingImage,
    RequestError,
)
from handler.parameters import parse_parameters

CONFIG = ModelConfig(decoder=DecoderConfig(vocabulary_size=5))
PARSER = RequestParser(CONFIG, ServingConfig(limits=ImageLimits(max_bytes=300), max_instances=3))
MODEL = ModelInfo("caption", "1.0", "sha256:abc")
IMAGE = b"\xff\xd8 an image \x00\xfe"
B64 = base64.b64encode(IMAGE).decode()
JSON = "application/json"
FORM = "multipart/form-data; boundary=x"


def captioned(text: str = "a dog", confidence: float = 0.5) -> CaptionedImage:
    image = PreparedImage(np.zeros((3, 1, 1), np.uint8), 640, 480, "JPEG", 1.234)
    caption = Caption(text, confidence, -7.13, ("<sos>", *text.split(), "<eos>"), (-0.9, -6.23))
    return CaptionedImage((caption,), image, "en", 12.0, 6.3)


@pytest.mark.parametrize("field", ["image", "data", "file", "body"])
def test_a_form_has_the_image_in_one_of_four_fields(field: str) -> None:
    request = PARSER.parse({field: bytearray(IMAGE), "beam_size": bytearray(b"3")}, FORM)
    assert request.images == (IMAGE,)
    assert request.parameters.beam_size == 3


@pytest.mark.parametrize(
    "content_type", ["image/jpeg", "application/octet-stream", "application/x-www-form-urlencoded", None, ""]
)
def test_a_raw_body_is_the_image(content_type: str | None) -> None:
    assert PARSER.parse({"body": bytearray(IMAGE)}, content_type).images == (IMAGE,)


@pytest.mark.parametrize(
    "content_type", [JSON, "application/json; charset=utf-8", "APPLICATION/JSON", "text/plain", "application/octet-stream"]
)
@pytest.mark.parametrize("parsed", [True, False])
def test_json_has_the_image_as_base64(content_type: str, parsed: bool) -> None:
    """TorchServe hands over an object for exactly `application/json`, bytes otherwise."""
    content = {"image": B64, "parameters": {"num_captions": 2}}
    body: Any = content if parsed else bytearray(json.dumps(content).encode())
    request = PARSER.parse({"body": body}, content_type)
    assert (request.images, request.form, request.parameters.num_captions) == ((IMAGE,), "single", 2)


@pytest.mark.parametrize(
    "value",
    [
        B64,
        f"data:image/jpeg;base64,{B64}",
        f"data:;base64,{B64}",
        f"data:image/jpeg;name=x.jpg;base64,{B64}",
        "\n ".join(B64),
        {"b64": B64},
        {"image": B64},
        {"image": {"b64": B64}},
    ],
)
def test_instances_take_base64_in_every_form(value: object) -> None:
    request = PARSER.parse({"body": {"instances": [value, {"b64": B64}], "signature_name": "serving_default"}}, JSON)
    assert (request.images, request.form) == ((IMAGE, IMAGE), "v1")


def v2(**changes: object) -> dict[str, object]:
    return {"id": "7", "inputs": [{"name": "image", "shape": [2], "datatype": "BYTES", "data": [B64, B64]} | changes]}


def test_a_v2_tensor() -> None:
    for shape in ([2], [2, 1]):
        request = PARSER.parse({"body": v2(shape=shape) | {"parameters": {"beam_size": 2}}}, JSON)
        assert (request.images, request.form, request.id) == ((IMAGE, IMAGE), "v2", "7")
        assert request.parameters.beam_size == 2


def test_query_parameters_hold_unless_the_body_says_otherwise() -> None:
    fields = {"body": {"image": B64, "parameters": {"beam_size": 2}}, "beam_size": "9", "max_length": "4"}
    parameters = PARSER.parse(fields, JSON).parameters
    assert (parameters.beam_size, parameters.max_length) == (2, 4)


@pytest.mark.parametrize(
    ("fields", "content_type", "error", "said"),
    [
        ({}, None, MissingImage, 'field "image"'),
        ({"body": bytearray()}, "image/jpeg", MissingImage, "raw body"),
        ({"body": bytearray()}, JSON, MissingImage, "no body"),
        ({"photo": bytearray(IMAGE)}, FORM, MissingImage, '"photo"'),
        ({"body": {"parameters": {}}}, JSON, MissingImage, 'no "image"'),
        ({"body": {"instances": []}}, JSON, MissingImage, "empty"),
        ({"image": bytearray(IMAGE), "file": bytearray(IMAGE)}, FORM, InvalidRequest, "one image"),
        ({"image": {"a": 1}}, FORM, InvalidRequest, "must be a file"),
        ({"image": bytearray(IMAGE), "beam_size": bytearray(b"x")}, FORM, InvalidParameter, "from 1 to 10"),
        ({"image": bytearray(IMAGE), "beam_size": bytearray(b"\xff")}, FORM, InvalidParameter, "not text"),
        ({"image": bytearray(IMAGE), "beam": bytearray(b"3")}, FORM, InvalidParameter, "the parameters are"),
        ({"body": bytearray(b"{'image'")}, JSON, InvalidRequest, "not valid JSON"),
        ({"body": bytearray(IMAGE)}, JSON, InvalidRequest, "not valid JSON"),
        ({"body": bytearray(b'{"a":' * 5_000)}, JSON, InvalidRequest, "not valid JSON"),
        ({"body": bytearray(b"[" * 100_000)}, JSON, InvalidRequest, "10,000 values"),
        ({"body": []}, JSON, InvalidRequest, "a list"),
        ({"body": None}, JSON, InvalidRequest, "null"),
        ({"body": 3}, JSON, InvalidRequest, "a number"),
        ({"body": {"image": "!!!!"}}, JSON, InvalidRequest, "base64"),
        ({"body": {"image": B64[:-1]}}, JSON, InvalidRequest, "base64"),
        ({"body": {"image": "https://example.com/cat.jpg"}}, JSON, InvalidRequest, "URL"),
        ({"body": {"image": "data:image/svg+xml,<svg/>"}}, JSON, InvalidRequest, "data URI"),
        ({"body": {"image": 3}}, JSON, InvalidRequest, "base64 text, not a number"),
        ({"body": {"image": ""}}, JSON, InvalidImage, "0 bytes"),
        ({"body": {"image": "A" * 500}}, JSON, ImageTooLarge, "300"),
        ({"body": {"image": B64, "beam_size": 3}}, JSON, InvalidRequest, '"beam_size"'),
        ({"body": {"image": B64, "parameters": []}}, JSON, InvalidRequest, "an object"),
        ({"body": {"image": B64, "parameters": {"beam_size": "3"}}}, JSON, InvalidParameter, "an integer"),
        ({"body": {"instances": B64}}, JSON, InvalidRequest, "a list"),
        ({"body": {"instances": [B64] * 4}}, JSON, InvalidRequest, "limit is 3"),
        ({"body": {"inputs": {}}}, JSON, InvalidRequest, "one tensor"),
        ({"body": {"inputs": []}}, JSON, InvalidRequest, "one tensor"),
        ({"body": v2(datatype="FP32")}, JSON, InvalidRequest, '"BYTES"'),
        ({"body": v2(shape=[3])}, JSON, InvalidRequest, "[2]"),
        ({"body": v2(data=None)}, JSON, InvalidRequest, "null"),
        ({"body": v2() | {"outputs": [{"name": "logits"}]}}, JSON, InvalidRequest, "caption, confidence, result"),
        ({"body": v2() | {"id": 7}}, JSON, InvalidRequest, '"id"'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(fields: dict[str, Any], content_type: str | None, error: type[RequestError], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        PARSER.parse(fields, content_type)
    assert type(caught.value) is error
    assert said in str(caught.value)


def test_a_bad_instance_leaves_the_others_alone() -> None:
    request = PARSER.parse({"body": {"instances": [{"b64": "?"}, {"b64": B64}, {"url": "x"}]}}, JSON)
    assert [type(image) for image in request.images] == [InvalidRequest, bytes, InvalidRequest]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([B64, "b64", "image"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["image", "b64", "instances", "inputs", "outputs", "parameters", "id", "data", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.sampled_from(["body", "image", "data", "beam_size", "x"]), JSON_VALUES | st.binary().map(bytearray)),
    st.sampled_from([JSON, FORM, "image/png", "text/plain", None, ";", "a" * 99]) | st.text(),
)
def test_whatever_comes_is_a_request_or_an_error_of_the_table(fields: dict[str, Any], content_type: str | None) -> None:
    try:
        request = PARSER.parse(fields, content_type)
    except RequestError as error:
        status, body = error_answer(error)
        assert 400 <= status < 500
        assert set(json.loads(body)["error"]) == {"code", "message"}
        assert len(body) < 1000
    else:
        assert request.images
        assert all(isinstance(image, bytes | RequestError) for image in request.images)


def single() -> CaptionRequest:
    return CaptionRequest((IMAGE,), parse_parameters({}, CONFIG))


def test_the_answer_has_the_contracts_shape() -> None:
    status, body = answer(single(), [captioned()], MODEL)
    assert status == 200
    assert json.loads(body) == {
        "captions": [
            {
                "caption": "a dog",
                "confidence": 0.5,
                "log_likelihood": -7.13,
                "sentence": ["<sos>", "a", "dog", "<eos>"],
                "token_log_likelihoods": [-0.9, -6.23],
            }
        ],
        "image": {"width": 640, "height": 480, "format": "JPEG"},
        "model": {"name": "caption", "version": "1.0", "language": "en", "digest": "sha256:abc"},
        "timing_ms": {"decode": 1.23, "encode": 12.0, "search": 6.3},
    }


def test_other_scripts_are_not_escaped_and_no_text_breaks_the_answer() -> None:
    assert "一只狗".encode() in answer(single(), [captioned("一只狗")], MODEL)[1]
    assert error_answer(InvalidParameter("\ud800"))[1].decode("utf-8")


def test_the_status_of_a_single_image_is_that_of_its_error() -> None:
    status, body = answer(single(), [ImageTooLarge("too large")], MODEL)
    assert (status, json.loads(body)) == (413, {"error": {"code": "ImageTooLarge", "message": "too large"}})


def test_v1_answers_in_order_with_errors_in_their_places() -> None:
    request = PARSER.parse({"body": {"instances": [B64, B64]}}, JSON)
    status, body = answer(request, [InvalidImage("no"), captioned()], MODEL)
    first, second = json.loads(body)["predictions"]
    assert status == 200
    assert first == {"error": {"code": "InvalidImage", "message": "no"}}
    assert second["captions"][0]["caption"] == "a dog"
    alone = PARSER.parse({"body": {"instances": [B64]}}, JSON)
    assert answer(alone, [InvalidImage("no")], MODEL)[0] == 200


def test_v2_answers_with_tensors() -> None:
    request = PARSER.parse({"body": v2()}, JSON)
    status, body = answer(request, [captioned(), InvalidImage("no")], MODEL)
    content = json.loads(body)
    assert status == 200
    assert (content["id"], content["model_name"], content["model_version"]) == ("7", "caption", "1.0")
    outputs = {output["name"]: output for output in content["outputs"]}
    assert outputs["caption"] == {"name": "caption", "datatype": "BYTES", "shape": [2], "data": ["a dog", ""]}
    assert outputs["confidence"] == {"name": "confidence", "datatype": "FP32", "shape": [2], "data": [0.5, 0.0]}
    assert json.loads(outputs["result"]["data"][1])["error"]["code"] == "InvalidImage"
    assert json.loads(outputs["result"]["data"][0])["captions"][0]["caption"] == "a dog"


def test_v2_answers_only_with_the_outputs_that_are_asked_for() -> None:
    request = PARSER.parse({"body": v2() | {"outputs": [{"name": "confidence"}]}}, JSON)
    content = json.loads(answer(request, [captioned(), captioned()], MODEL)[1])
    assert [output["name"] for output in content["outputs"]] == ["confidence"]


def test_every_error_has_a_status_and_a_code_of_its_own() -> None:
    def tree(root: type[CaptionError]) -> list[type[CaptionError]]:
        return [root, *(e for child in root.__subclasses__() for e in tree(child))]

    codes = {error.code: error.status for error in tree(RequestError)}
    assert codes == {
        "InvalidRequest": 400,
        "MissingImage": 400,
        "InvalidImage": 400,
        "InvalidParameter": 400,
        "ImageTooLarge": 413,
        "UnsupportedFormat": 415,
    }
