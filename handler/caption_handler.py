"""TorchServe's entry point, and the only file that knows TorchServe.

TorchServe takes the one class of this module, calls `initialize` once in each worker and `handle` for each batch.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from ts.metrics.dimension import Dimension

from handler.access_log import AccessLog, client_id, entry
from handler.captioner import CaptionedImage, PreparedImage, load_captioner
from handler.config import ServingConfig
from handler.contract import (
    CONTENT_TYPE,
    CaptionRequest,
    ModelInfo,
    RequestParser,
    Result,
    answer,
    description,
    error_answer,
)
from handler.counters import Counters
from handler.errors import CaptionError
from handler.parameters import Parameters

logger = logging.getLogger(__name__)
T = TypeVar("T")
_OUR_FAULT = "the server failed on this request; its log says more"


class CaptionHandler:
    def initialize(self, context: Any) -> None:
        """Load the checkpoint of the .mar onto the worker's device and caption once, so that no client pays for it."""
        # TorchServe reads its counters from the worker's log, and writes two lines of its own for each batch beside them.
        for name, level in (("", logging.WARNING), ("ts", logging.INFO), ("handler", logging.INFO)):
            logging.getLogger(name).setLevel(level)
        directory = Path(context.system_properties["model_dir"])
        self.serving = ServingConfig.model_validate((context.model_yaml_config or {}).get("caption", {}))
        gpu = context.system_properties.get("gpu_id")
        device = "cpu" if gpu is None else _device(gpu)
        self.captioner = load_captioner(directory / "checkpoint", directory / "engine", self.serving, device=device)
        self.parser = RequestParser(self.captioner.config, self.serving)
        version = context.manifest["model"]["modelVersion"]
        self.access_log = AccessLog() if self.serving.access_log else None
        self.counters = Counters(partial(_count, context.metrics))
        self.model = ModelInfo(context.model_name, str(version), self.captioner.digest)
        self.captioner.warm_up()
        logger.info("model %s %s %s on %s", self.model.name, self.model.version, self.model.digest, device)

    def handle(self, rows: list[dict[str, Any]], context: Any) -> list[bytes]:
        """Answer each request of the batch by itself: neither an error nor a description touches the others."""
        began = time.perf_counter()
        headers = [_headers(context, index) for index in range(len(rows))]
        requests = [self._read(row, headers[index]) for index, row in enumerate(rows)]
        results = iter(self._caption([request for request in requests if isinstance(request, CaptionRequest)]))
        answers: list[bytes] = []
        for index, request in enumerate(requests):
            if isinstance(request, bytes):
                answers.append(request)
                continue
            found: list[Result] = []
            if isinstance(request, CaptionRequest):
                found = next(results)
                status, body = answer(request, found, self.model)
            else:
                self.counters.add("CaptionErrors", 1, code=request.code)
                status, body = error_answer(request)
            if status != HTTPStatus.OK:
                context.set_response_status(status, HTTPStatus(status).phrase, index)
            context.set_response_content_type(index, CONTENT_TYPE)
            if self.access_log is not None:
                identity = {"id": client_id(headers[index]) or context.get_request_id(index), "version": self.model.version}
                ms = round((time.perf_counter() - began) * 1e3, 2)
                self.access_log.add(entry(request, found, status=status, ms=ms, batch=len(rows), **identity))
            answers.append(body)
        return answers

    def _read(self, row: dict[str, Any], headers: dict[str, str]) -> CaptionRequest | CaptionError | bytes:
        # The management API asks for a description with this header. A client can send it too: with an image it is a
        # plain request all the same, and without one there is nothing to lose.
        if headers.get("describe") == "True" and not any(row.values()):
            return description(self.captioner.config, self.model, self.serving)
        return _guarded(lambda: self.parser.parse(row, headers.get("content-type")))

    def _caption(self, requests: list[CaptionRequest]) -> list[list[Result]]:
        """Caption the images of all requests together: a result for each image of each request."""
        prepared = [self._prepare(request) for request in requests]
        good = [
            (image, request.parameters)
            for request, images in zip(requests, prepared, strict=True)
            for image in images
            if isinstance(image, PreparedImage)
        ]
        answered = self._search([image for image, _ in good], [parameters for _, parameters in good])
        captioned = [result for result in answered if isinstance(result, CaptionedImage)]
        if captioned:
            self.counters.add("CaptionedImages", len(captioned))
            self.counters.add("Captions", sum(len(result.captions) for result in captioned))
            self.counters.add("DecodeMilliseconds", sum(image.decode_ms for image, _ in good))
            self.counters.add("EncodeMilliseconds", captioned[0].encode_ms)
            self.counters.add("SearchMilliseconds", captioned[0].search_ms)
        remaining = iter(answered)
        results = [[i if isinstance(i, CaptionError) else next(remaining) for i in images] for images in prepared]
        for code, times in Counter(r.code for of_one in results for r in of_one if isinstance(r, CaptionError)).items():
            self.counters.add("CaptionErrors", times, code=code)
        return results

    def _search(self, images: list[PreparedImage], parameters: list[Parameters]) -> list[Result]:
        """Caption images together; should that fail, each by itself, so that the one at fault fails alone."""
        try:
            return list(self.captioner.caption(images, parameters))
        except Exception:
            if len(images) > 1:
                logger.exception("a batch of %d images failed; trying them one by one", len(images))
                return [self._search([i], [p])[0] for i, p in zip(images, parameters, strict=True)]
            logger.exception("an image failed in a way that it should not")
            return [CaptionError(_OUR_FAULT)]

    def _prepare(self, request: CaptionRequest) -> list[PreparedImage | CaptionError]:
        """Decode the images of a request in a time that does not depend on their number: a batch that takes longer than
        `responseTimeout` costs TorchServe the worker."""
        deadline = time.monotonic() + self.serving.decoding.seconds

        def prepare(image: bytes | CaptionError) -> PreparedImage | CaptionError:
            if isinstance(image, CaptionError):
                return image
            return _guarded(lambda: self.captioner.prepare(image, deadline - time.monotonic()))

        return [prepare(image) for image in request.images]


def _device(gpu: int) -> str:
    """Where a worker computes that TorchServe has given a GPU to."""
    import torch  # not without need: it takes a second and 140 MiB

    return f"cuda:{gpu}" if torch.cuda.is_available() else "cpu"


def _guarded(read: Callable[[], T]) -> T | CaptionError:
    """Whatever one request's data does, the other requests of the batch are answered."""
    try:
        return read()
    except CaptionError as error:
        return error
    except Exception:
        logger.exception("a request failed in a way that it should not")
        return CaptionError(_OUR_FAULT)


def _headers(context: Any, index: int) -> dict[str, str]:
    """The headers of a request, their names in lower case."""
    # A form field's own headers stand here under its name, as a dict.
    return {k.lower(): v for k, v in context.get_all_request_header(index).items() if isinstance(v, str)}


def _count(metrics: Any, name: str, value: float, **labels: str) -> None:
    """Add to a counter of metrics.yaml. TorchServe appends to the list it is given, so each call needs its own."""
    dimensions = [Dimension(label.capitalize(), text) for label, text in labels.items()]
    metrics.add_metric(name, value, "ms" if name.endswith("Milliseconds") else "count", dimensions=dimensions)
