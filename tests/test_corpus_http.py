"""The corpus against a running service: every file and request its status, no 5xx, the same workers at the end."""

from __future__ import annotations

import io
import socket
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handler.config import DecodingConfig, ImageLimits, PreprocessingConfig
from handler.isolation import ImageReader
from scripts import scorecard
from scripts.scorecard import Service
from scripts.server import TorchServe
from tests import corpus
from tests.conftest import SAMPLES

pytestmark = [pytest.mark.server, pytest.mark.slow]

CAT = next(path.read_bytes() for path in SAMPLES if path.stem == "cat")


@pytest.fixture(scope="module")
def service(server: TorchServe) -> Service:
    return Service(server.address("inference"), server.address("management"))


@pytest.fixture(autouse=True)
def no_worker_is_restarted(service: Service) -> Iterator[None]:
    before = service.workers()
    yield
    assert service.workers() == before


def test_every_file_has_its_status(service: Service) -> None:
    """Of the damaged files every fourth, since the decoder itself is tested with all."""
    whole = [case for case in corpus.images() if "," not in case.name]
    damaged = [case for case in corpus.images() if "," in case.name][::4]
    result = scorecard.run_corpus(service, whole + damaged, [])
    assert result.tried > 450
    assert (result.unexpected, result.server_errors) == ([], [])
    assert result.valid_captioned == result.valid > 150
    assert result.rejected == result.must_reject > 150


def test_every_request_has_its_status(service: Service) -> None:
    result = scorecard.run_corpus(service, [], corpus.requests())
    assert result.tried > 150
    assert (result.unexpected, result.server_errors) == ([], [])


def test_one_photo_in_fifty_encodings_gets_one_caption(service: Service) -> None:
    """Without exception where the pixels are the same; where a lossy format changed them, a model may waver between two
    captions that it finds all but equally good."""
    reader = ImageReader(ImageLimits(), PreprocessingConfig(), DecodingConfig())
    with Image.open(io.BytesIO(CAT)) as image:
        files = {e.name: reader.read(e.data).pixels for e in corpus.encodings(image.convert("RGB")) if e.faithful}
    reader.close()
    same = {name for name, pixels in files.items() if np.array_equal(pixels, files["PNG"])}
    result = scorecard.agreement(service, [path for path in SAMPLES if path.stem == "cat"])
    print(f"one photo, one caption: {result.agreed} of {result.encodings}, {len(same)} of them without loss")
    assert result.encodings >= 50
    assert len(same) >= 25
    assert [one for one in result.others if one.split(" as ")[1].split(":")[0] in same] == []
    assert result.agreed >= 0.95 * result.encodings, result.others


def test_sixteen_clients_that_send_bombs_hurt_nobody(service: Service) -> None:
    before = service.memory()["workers"]
    result = scorecard.bombs_beside_good(service, seconds=6)
    print(result)
    assert result.bombs_refused == result.bombs > 0
    assert result.good_failed == 0 < result.good
    assert result.peak_workers_mib * scorecard.MIB < before + 200 * scorecard.MIB


def test_sixteen_images_of_49_megapixels_at_once_stay_within_the_memory_of_one(service: Service) -> None:
    """They are allowed, and decoded; each at a time, by the child of the worker that has a memory limit."""
    large = next(case for case in corpus.images() if case.name == "PNG 49 megapixels")
    with scorecard.peak_memory(service) as peak, ThreadPoolExecutor(16) as pool:
        before = dict(peak)
        heavy = [pool.submit(service.predict, large.data) for _ in range(16)]
        good = [service.predict(CAT) for _ in range(4)]
        statuses = [answer.result().status for answer in heavy]
    assert [answer.status for answer in good] == [200] * 4
    assert set(statuses) <= {200, 413}  # 413 where the batch's time was over before it was its turn
    assert peak["workers"] - before["workers"] < 1200 * scorecard.MIB


def test_nothing_of_a_client_is_written_to_disk(service: Service) -> None:
    """Neither while a large form is received nor while it is decoded, nor for good."""
    seen: set[Path] = set()
    over = threading.Event()
    before = scorecard.temporary_files(service)

    def watch() -> None:
        while not over.is_set():
            seen.update(scorecard.temporary_files(service))

    watcher = threading.Thread(target=watch)
    watcher.start()
    form = corpus.multipart(corpus.file_part(CAT + bytes(12 * 2**20), kind="image/jpeg"))
    for _ in range(3):
        assert service.send(corpus.RequestCase("", form, corpus.GOOD, corpus.FORM)).status == 200
    assert service.predict(b"\xff\xd8" + bytes(12 * 2**20)).status == 400
    over.set()
    watcher.join()
    assert seen - before == set()


def test_a_clients_name_of_its_request_comes_back_only_if_it_is_harmless(service: Service) -> None:
    def answered(*names: str, image: bytes = CAT) -> str:
        headers = tuple(("X-Request-Id", name) for name in names)
        return service.send(corpus.RequestCase("", image, corpus.ANSWERED, headers)).headers["x-request-id"]

    assert answered("order-17/b:2") == "order-17/b:2"
    assert answered("order-18", image=b"no image") == "order-18"
    assert answered("first", "second") == "first"
    assert answered("a" * 128) == "a" * 128
    own = [answered(name) for name in ("a" * 129, "a b<script>", "%0d%0aSet-Cookie:x")] + [answered()]
    assert len({str(uuid.UUID(one)) for one in own}) == len(own)


def test_clients_that_leave_in_the_middle_hurt_nobody(service: Service, server: TorchServe) -> None:
    host, port = server.address("inference").removeprefix("http://").split(":")
    head = b"POST /predictions/caption HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(CAT)
    for sent in (b"", head[:20], head, head + CAT[:100], head + CAT):
        for _ in range(5):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(sent)
    assert [service.predict(CAT).status for _ in range(3)] == [200] * 3


def test_clients_that_send_slowly_hold_up_nobody(service: Service, server: TorchServe) -> None:
    host, port = server.address("inference").removeprefix("http://").split(":")
    head = b"POST /predictions/caption HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    slow = [socket.create_connection((host, int(port))) for _ in range(200)]
    try:
        for connection in slow:
            connection.sendall(head)
        assert [service.predict(CAT).status for _ in range(3)] == [200] * 3
    finally:
        for connection in slow:
            connection.close()
