"""The handler with TorchServe's own context class, without a server."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ts.context import Context, RequestProcessor
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from handler import access_log
from handler.caption_handler import CaptionHandler
from handler.checkpoint import Checkpoint, save_checkpoint
from tests.conftest import ROOT

Encoded = Callable[..., bytes]


@pytest.fixture(scope="module")
def context(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Context:
    directory = tmp_path_factory.mktemp("model")
    save_checkpoint(
        directory / "checkpoint",
        config=checkpoint.config,
        vocabulary=checkpoint.vocabulary,
        encoder=checkpoint.encoder,
        decoder=checkpoint.decoder,
    )
    metrics = MetricsCacheYamlImpl(str(ROOT / "deploy/torchserve/metrics.yaml"))
    metrics.initialize_cache()
    metrics.model_name = "caption"
    settings = yaml.safe_load((ROOT / "deploy/torchserve/model-config.yaml").read_text())
    manifest = {"model": {"modelName": "caption", "modelVersion": "2.5"}}
    return Context("caption", str(directory), manifest, 8, None, "0.12.0", metrics=metrics, model_yaml_config=settings)


@pytest.fixture(scope="module")
def handler(context: Context) -> CaptionHandler:
    handler = CaptionHandler()
    handler.initialize(context)
    return handler


@pytest.fixture
def send(handler: CaptionHandler, context: Context) -> Callable[..., list[tuple[int, str | None, Any]]]:
    """A batch of (fields, headers) to (status, content type, body) of each."""

    def handle(*batch: tuple[dict[str, Any], dict[str, Any]]) -> list[tuple[int, str | None, Any]]:
        context.request_processor = [RequestProcessor(headers) for _, headers in batch]
        context.request_ids = {index: f"id-{index}" for index in range(len(batch))}
        context.metrics.request_ids = context.request_ids
        bodies = handler.handle([fields for fields, _ in batch], context)
        if handler.access_log is not None:
            handler.access_log.flush()  # or its lines are those of the next test
        assert len(bodies) == len(batch)
        return [
            (
                context.get_response_status(index)[0],
                context.get_response_content_type(index),
                json.loads(body),
            )
            for index, body in enumerate(bodies)
        ]

    return handle


FORM = {"Content-Type": "multipart/form-data; boundary=x"}


def test_good_and_bad_requests_of_a_batch_are_answered_each_for_itself(send: Any, encoded: Encoded) -> None:
    image = bytearray(encoded())
    answers = send(
        ({"image": image}, FORM),
        ({"image": bytearray(b"no image")}, FORM),
        ({"image": image, "beam_size": bytearray(b"2")}, FORM),
        ({}, {}),
        ({"body": bytearray(b"{")}, {"content-type": "application/json"}),
        ({"body": bytearray(b"<svg/>")}, {"Content-Type": "image/svg+xml"}),
        ({"body": image}, {"Content-Type": "image/jpeg"}),
    )
    assert [status for status, _, _ in answers] == [200, 400, 200, 400, 400, 415, 200]
    assert {content_type for _, content_type, _ in answers} == {"application/json; charset=utf-8"}
    codes = [body.get("error", {}).get("code") for _, _, body in answers]
    assert codes == [None, "InvalidImage", None, "MissingImage", "InvalidRequest", "UnsupportedFormat", None]
    first, last = answers[0][2], answers[6][2]
    assert [c["caption"] for c in first["captions"]] == [c["caption"] for c in last["captions"]]
    assert len(answers[2][2]["captions"]) <= 2
    assert first["model"]["version"] == "2.5"
    assert first["model"]["name"] == "caption"


def test_the_description_has_what_a_client_needs(send: Any) -> None:
    ((status, _, body),) = send(({}, {"describe": "True"}))
    assert status == 200
    assert body["parameters"]["beam_size"]["maximum"] == 10
    assert body["limits"] == {"max_bytes": 20 * 2**20, "max_pixels": 50_000_000, "max_side": 16_000, "max_instances": 32}
    assert body["digest"].startswith("sha256:")


def test_a_client_that_asks_for_a_description_disturbs_nobody(send: Any, encoded: Encoded) -> None:
    image = bytearray(encoded())
    answers = send(({"body": image}, {"describe": "True"}), ({"body": image}, {}), ({}, {"describe": "True"}))
    assert "captions" in answers[0][2]
    assert "captions" in answers[1][2]


def test_a_form_field_named_like_a_header_is_no_header(send: Any, encoded: Encoded) -> None:
    """TorchServe keeps the headers of form fields in the same dict, under the fields' names."""
    ((status, _, _),) = send(({"image": bytearray(encoded())}, FORM | {"image": {"content-type": "image/jpeg"}}))
    assert status == 200


def test_a_fault_of_ours_is_a_500_for_that_request_alone(
    send: Any, handler: CaptionHandler, encoded: Encoded, monkeypatch: Any
) -> None:
    prepare = handler.captioner.prepare
    image = encoded()

    def fail(data: bytes, seconds: float) -> Any:
        if data == b"poison":
            raise RuntimeError("a bug")
        return prepare(data, seconds)

    monkeypatch.setattr(handler.captioner, "prepare", fail)
    answers = send(({"body": bytearray(b"poison")}, {}), ({"body": bytearray(image)}, {}))
    assert [status for status, _, _ in answers] == [500, 200]
    assert "a bug" not in json.dumps(answers[0][2])


def test_metrics_are_counted_as_they_are_declared(
    send: Any, handler: CaptionHandler, encoded: Encoded, caplog: pytest.LogCaptureFixture
) -> None:
    """An undeclared name or dimension is an error in TorchServe's log, and nothing in Prometheus."""
    handler.counters.flush()  # what other tests counted
    caplog.clear()
    with caplog.at_level("INFO"):
        send(({"body": bytearray(encoded())}, {}), ({"body": bytearray(b"x")}, {}))
        handler.counters.flush()
    lines = [record.getMessage() for record in caplog.records if "[METRICS]" in record.getMessage()]
    assert not [line for line in lines if "Failed" in line]
    names = {line.partition("[METRICS]")[2].partition(".")[0] for line in lines}
    assert names >= {"CaptionedImages", "Captions", "DecodeMilliseconds", "EncodeMilliseconds", "SearchMilliseconds"}
    (error,) = [line for line in lines if "CaptionErrors" in line]
    assert "Code:InvalidImage" in error


def test_a_fault_of_the_search_fails_the_image_at_fault_alone(
    send: Any, handler: CaptionHandler, encoded: Encoded, monkeypatch: Any
) -> None:
    caption = handler.captioner.caption

    def fail(images: Any, parameters: Any) -> Any:
        if any(image.format == "GIF" for image in images):
            raise RuntimeError("out of memory")
        return caption(images, parameters)

    monkeypatch.setattr(handler.captioner, "caption", fail)
    answers = send(*(({"body": bytearray(encoded(f))}, {}) for f in ("PNG", "GIF", "JPEG")))
    assert [status for status, _, _ in answers] == [200, 500, 200]
    assert [answer["image"]["format"] for _, _, answer in answers[::2]] == ["PNG", "JPEG"]


def logged(handler: CaptionHandler, caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    assert handler.access_log is not None
    handler.access_log.flush()
    return [json.loads(r.getMessage()) for r in caplog.records if r.name == "handler.access_log"]


def test_each_request_is_a_line_of_the_access_log(
    send: Any, handler: CaptionHandler, encoded: Encoded, caplog: pytest.LogCaptureFixture
) -> None:
    instances = {"instances": [base64.b64encode(encoded()).decode(), "QUJD"]}
    with caplog.at_level("INFO"):
        send(
            ({"image": bytearray(encoded())}, FORM | {"X-Request-Id": "order-7"}),
            ({"body": bytearray(b"no image")}, {"x-request-id": "a b\r\nSet-Cookie: x"}),
            ({"body": bytearray(json.dumps(instances).encode())}, {"content-type": "application/json"}),
            ({}, {}),
        )
        one, bad, many, empty = logged(handler, caplog)
    assert (one["status"], one["id"], one["batch"], one["version"]) == (200, "order-7", 4, "2.5")
    assert one["images"][0].items() >= {"width": 90, "height": 60, "format": "JPEG"}.items()
    assert {"time", "ms", "encode_ms", "search_ms", "bytes"} <= set(one)
    assert (bad["status"], bad["code"], bad["id"]) == (400, "InvalidImage", "id-1")
    assert (many["status"], many["form"], many["code"]) == (200, "v1", "InvalidImage")
    assert [image.get("code") for image in many["images"]] == [None, "InvalidImage"]
    assert (empty["status"], empty["code"]) == (400, "MissingImage")


def test_nothing_of_a_request_is_in_the_log(send: Any, handler: CaptionHandler, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        send(
            ({"body": bytearray(b"secret"), "secret": bytearray(b"secret")}, {"X-Secret": "secret"}),
            ({"body": bytearray(b'{"image": "secret", "secret": 1}')}, {"content-type": "application/json"}),
        )
        assert len(logged(handler, caplog)) == 2
    assert "secret" not in caplog.text


def test_a_log_that_cannot_keep_up_drops_lines_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    gate = threading.Event()

    def slow(line: str) -> None:
        gate.wait()
        written.append(line)

    monkeypatch.setattr(access_log.logger, "info", slow)
    log = access_log.AccessLog(capacity=2)
    for number in range(50):
        log.add({"number": number})
    gate.set()
    log.flush()
    log.add({"number": 50})
    log.flush()
    assert len(written) < 10
    assert sum(json.loads(line).get("dropped_before", 0) for line in written) == 51 - len(written)


def test_the_module_has_the_one_class_that_torchserve_takes() -> None:
    import inspect

    from handler import caption_handler

    classes = [c for _, c in inspect.getmembers(caption_handler, inspect.isclass) if c.__module__ == caption_handler.__name__]
    assert classes == [CaptionHandler]


def test_only_the_handler_module_knows_torchserve() -> None:
    for path in Path(ROOT / "handler").glob("*.py"):
        if path.name != "caption_handler.py":
            assert "\nfrom ts" not in path.read_text(), path
            assert "\nimport ts" not in path.read_text(), path
