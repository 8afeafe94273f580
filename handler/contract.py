"""The HTTP contract, without HTTP: request fields to images and parameters, results to the JSON of the answer.

Three forms of request are understood, and answered in kind:

`single`  one image as a multipart field, as the raw body, or as JSON `{"image": "<base64>", "parameters": {…}}`
`v1`      `{"instances": […], "parameters": {…}}`, as TensorFlow Serving and KServe V1 have it
`v2`      a BYTES tensor of base64 texts, the Open Inference Protocol
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from handler.captioner import CaptionedImage
from handler.config import ModelConfig, ServingConfig
from handler.decoding import FORMATS
from handler.errors import (
    CaptionError,
    ImageTooLarge,
    InvalidImage,
    InvalidParameter,
    InvalidRequest,
    MissingImage,
    RequestError,
)
from handler.parameters import Parameters, describe, from_text, parse_parameters

CONTENT_TYPE = "application/json; charset=utf-8"
MAX_JSON_VALUES = 10_000
"""In one body. A megabyte of "[],[],…" becomes 50 megabytes of lists; 32 images and their parameters are 200 values."""
IMAGE_FIELDS = ("image", "data", "file", "body")
OUTPUTS = {"caption": "BYTES", "confidence": "FP32", "result": "BYTES"}
"""The tensors of a `v2` answer and their types."""

_DATA_URI = re.compile(r"data:[\w.+-]*/?[\w.+-]*(;[\w.+-]+=[^;,]*)*;base64,", re.IGNORECASE)
_WHITE_SPACE = re.compile(r"\s+")
_SEND_IMAGE = 'send the image in the multipart field "image", as the raw body, or as base64 in JSON {"image": "…"}'

Image = bytes | RequestError
"""The bytes of an image file, or why there are none."""
Result = CaptionedImage | CaptionError


@dataclass(frozen=True)
class ModelInfo:
    """The model as an answer names it."""

    name: str
    version: str
    digest: str


@dataclass(frozen=True)
class CaptionRequest:
    images: tuple[Image, ...]
    """In a `v1` or `v2` request one bad image leaves the others alone, hence the errors in its place."""
    parameters: Parameters
    form: Literal["single", "v1", "v2"] = "single"
    id: str | None = None
    outputs: tuple[str, ...] = tuple(OUTPUTS)


class RequestParser:
    """Reads requests for one model. Every way of failing is a RequestError."""

    def __init__(self, config: ModelConfig, serving: ServingConfig) -> None:
        self.config = config
        self.max_bytes = serving.limits.max_bytes
        self.max_instances = serving.max_instances

    def parse(self, fields: Mapping[str, Any], content_type: str | None) -> CaptionRequest:
        """The fields of a request (body, form fields, query parameters) and its Content-Type header.

        Values are bytes, text, or JSON that has been parsed already.
        """
        media_type = (content_type or "").partition(";")[0].strip().lower()
        images = {name: value for name, value in fields.items() if name in IMAGE_FIELDS}
        others = {name: value for name, value in fields.items() if name not in IMAGE_FIELDS}
        if media_type != "multipart/form-data" and "body" in images and _is_json(images["body"], media_type):
            return self._from_json(_parsed(images["body"]), _texts(others))
        if not images or (images.get("body") in (b"", "") and media_type != "multipart/form-data"):
            got = f" (fields sent: {', '.join(_shown(name) for name in others)})" if others else ""
            raise MissingImage(f"the request has no image{got}: {_SEND_IMAGE}")
        if len(images) > 1:
            raise InvalidRequest(
                f'one image a request in this form, not {len(images)}: send several as JSON {{"instances": […]}}'
            )
        (value,) = images.values()
        parameters = parse_parameters(_texts(others), self.config)
        if isinstance(value, str):  # a text/… part or body
            value = value.encode()
        if not isinstance(value, bytes | bytearray):
            raise InvalidRequest(f"the image must be a file, not JSON: {_SEND_IMAGE}")
        return CaptionRequest((bytes(value),), parameters)

    def _from_json(self, body: Any, query: Mapping[str, Any]) -> CaptionRequest:
        if not isinstance(body, dict):
            raise InvalidRequest(f"the JSON body must be an object, not {_kind(body)}: {_SEND_IMAGE}")
        given = body.get("parameters", {})
        if not isinstance(given, dict):
            raise InvalidRequest(f'"parameters" must be an object, not {_kind(given)}')
        parameters = parse_parameters({**query, **given}, self.config)
        if "instances" in body:
            _only_keys(body, {"instances", "parameters", "signature_name"})
            images = self._many(body["instances"], '"instances"')
            return CaptionRequest(tuple(images), parameters, "v1")
        if "inputs" in body:
            return self._from_v2(body, parameters)
        _only_keys(body, {"image", "parameters"})
        if "image" not in body:
            raise MissingImage(f'the JSON body has no "image": {_SEND_IMAGE}')
        return CaptionRequest((self._image(body["image"]),), parameters)

    def _from_v2(self, body: dict[str, Any], parameters: Parameters) -> CaptionRequest:
        _only_keys(body, {"id", "inputs", "outputs", "parameters"})
        inputs = body["inputs"]
        if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
            raise InvalidRequest(
                '"inputs" must be a list of one tensor: {"name": "image", "shape": [N], "datatype": "BYTES", "data": […]}'
            )
        tensor = inputs[0]
        if tensor.get("datatype") != "BYTES":
            raise InvalidRequest(f'the tensor\'s "datatype" must be "BYTES", not {_shown(tensor.get("datatype"))}')
        images = self._many(tensor.get("data"), 'the tensor\'s "data"')
        if tensor.get("shape") not in ([len(images)], [len(images), 1]):
            raise InvalidRequest(
                f'the tensor\'s "shape" must be [{len(images)}] as its data, not {_shown(tensor.get("shape"))}'
            )
        outputs = body.get("outputs", [{"name": name} for name in OUTPUTS])
        if not isinstance(outputs, list) or not all(isinstance(o, dict) and o.get("name") in OUTPUTS for o in outputs):
            raise InvalidRequest(f'"outputs" must be a list of {{"name": …}} with the names {", ".join(OUTPUTS)}')
        if not isinstance(body.get("id", ""), str):
            raise InvalidRequest(f'"id" must be a text, not {_kind(body["id"])}')
        names = tuple(output["name"] for output in outputs) or tuple(OUTPUTS)
        return CaptionRequest(tuple(images), parameters, "v2", body.get("id"), names)

    def _many(self, values: Any, where: str) -> list[Image]:
        if not isinstance(values, list):
            raise InvalidRequest(f"{where} must be a list of images, not {_kind(values)}")
        if not values:
            raise MissingImage(f"{where} is empty: send at least one image")
        if len(values) > self.max_instances:
            raise InvalidRequest(f"{where} has {len(values)} images, the limit is {self.max_instances} a request")
        images: list[Image] = []
        for value in values:
            try:
                images.append(self._image(value))
            except RequestError as error:
                images.append(error)
        return images

    def _image(self, value: Any) -> bytes:
        """Base64, a data URI, or either in `{"b64": …}` or `{"image": …}`, to the bytes of an image file."""
        for key in ("image", "b64"):
            if isinstance(value, dict) and key in value:
                _only_keys(value, {key})
                value = value[key]
        if not isinstance(value, str):
            raise InvalidRequest(f"an image in JSON must be base64 text, not {_kind(value)}")
        if value.startswith(("http://", "https://")):
            raise InvalidRequest("images are not fetched from URLs: send the image itself, as base64")
        uri = _DATA_URI.match(value)
        if uri is None and value[:5].lower() == "data:":
            raise InvalidRequest("a data URI must carry base64: data:image/jpeg;base64,…")
        text = _WHITE_SPACE.sub("", value[uri.end() if uri else 0 :])
        if len(text) * 3 // 4 - 2 > self.max_bytes:
            raise ImageTooLarge(f"the image has some {len(text) * 3 // 4:,} bytes, the limit is {self.max_bytes:,}")
        if not text:
            raise InvalidImage("the image is empty (0 bytes)")
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidRequest(f"the image is not valid base64 ({error})") from None


def answer(request: CaptionRequest, results: Sequence[Result], model: ModelInfo) -> tuple[int, bytes]:
    """The status and body that answer a request, given a result for each of its images."""
    if len(results) == 1 and request.form != "v1" and isinstance(results[0], CaptionError):
        return error_answer(results[0])
    objects = [result_json(result, model) for result in results]
    if request.form == "single":
        return 200, _encoded(objects[0])
    if request.form == "v1":
        return 200, _encoded({"predictions": objects})
    return 200, _encoded(_v2_answer(request, objects, model))


def error_answer(error: CaptionError) -> tuple[int, bytes]:
    return error.status, _encoded(error.as_json())


def description(config: ModelConfig, model: ModelInfo, serving: ServingConfig) -> bytes:
    """What the model is and takes, for the management API: JSON."""
    about = {
        **asdict(model),
        "language": config.languages[0].code,
        "languages": [language.code for language in config.languages],
        "architecture": {"encoder": config.encoder.architecture, "decoder": "lstm", "input": config.preprocessing.size},
        "parameters": describe(config),
        "formats": list(FORMATS),
        "limits": {**serving.limits.model_dump(), "max_instances": serving.max_instances},
    }
    return json.dumps(about, indent=2).encode()


def result_json(result: Result, model: ModelInfo) -> dict[str, Any]:
    """The object that stands for one image in an answer: its captions, or why there are none."""
    if isinstance(result, CaptionError):
        return result.as_json()
    image = result.image
    return {
        "captions": [
            {
                "caption": caption.caption,
                "confidence": round(caption.confidence, 6),
                "log_likelihood": round(caption.log_likelihood, 6),
                "sentence": caption.sentence,
                "token_log_likelihoods": [round(value, 6) for value in caption.token_log_likelihoods],
            }
            for caption in result.captions
        ],
        "image": {"width": image.width, "height": image.height, "format": image.format},
        "model": {"name": model.name, "version": model.version, "language": result.language, "digest": model.digest},
        "timing_ms": {
            "decode": round(image.decode_ms, 2),
            "encode": round(result.encode_ms, 2),
            "search": round(result.search_ms, 2),
        },
    }


def _v2_answer(request: CaptionRequest, objects: list[dict[str, Any]], model: ModelInfo) -> dict[str, Any]:
    best = [next(iter(o.get("captions", ())), {"caption": "", "confidence": 0.0}) for o in objects]
    data: dict[str, list[Any]] = {
        "caption": [caption["caption"] for caption in best],
        "confidence": [caption["confidence"] for caption in best],
        "result": [json.dumps(o, ensure_ascii=False, separators=(",", ":")) for o in objects],
    }
    outputs = [{"name": n, "datatype": OUTPUTS[n], "shape": [len(objects)], "data": data[n]} for n in request.outputs]
    identity = {} if request.id is None else {"id": request.id}
    return {"model_name": model.name, "model_version": model.version, **identity, "outputs": outputs}


def _encoded(content: Any) -> bytes:
    # A lone surrogate, which JSON may carry in and a message quote, has no UTF-8.
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace")


def _is_json(body: Any, media_type: str) -> bool:
    if not isinstance(body, bytes | bytearray | str):
        return True
    if media_type == "application/json" or media_type.endswith("+json"):
        return True
    # No image format begins with a brace, so JSON under another Content-Type is JSON all the same.
    return body[:64].lstrip()[:1] in (b"{", "{")


def _parsed(body: Any) -> Any:
    if not isinstance(body, bytes | bytearray | str):
        return body
    if not body:
        raise MissingImage(f"the request has no body: {_SEND_IMAGE}")
    data = body.encode("utf-8", "replace") if isinstance(body, str) else body
    if sum(data.count(mark) for mark in b"[{,") > MAX_JSON_VALUES:  # base64 has none of them
        raise InvalidRequest(f"the JSON body has more than {MAX_JSON_VALUES:,} values: {_SEND_IMAGE}")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON ({str(error)[:100]}): {_SEND_IMAGE}") from None


def _texts(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Form fields and query parameters to values."""
    values = {}
    for name, value in fields.items():
        if isinstance(value, bytes | bytearray):
            try:
                value = value.decode()
            except UnicodeDecodeError:
                raise InvalidParameter(f"the field {_shown(name)} is not text") from None
        values[name] = from_text(name, value.strip()) if isinstance(value, str) else value
    return values


def _only_keys(body: Mapping[str, Any], known: Iterable[str]) -> None:
    unknown = sorted(set(body) - set(known))
    if unknown:
        raise InvalidRequest(f"unknown key {_shown(unknown[0])} in the JSON body: the keys are {', '.join(sorted(known))}")


def _kind(value: Any) -> str:
    """A JSON value's type as JSON calls it."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
