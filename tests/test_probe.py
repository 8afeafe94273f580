"""What the probes and the supervisor make of the answers that a service can give. A small HTTP server plays the service."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from handler.config import ImageLimits
from handler.decoding import decode
from scripts.probe import CANARY, no_caption, not_alive, not_ready, switched_off, work_done
from scripts.server import ServerError, TorchServe, Watchdog
from tests.conftest import ROOT


class Played:
    """A service whose answers a test sets."""

    def __init__(self) -> None:
        self.model: Any = [{"minWorkers": 1, "workers": [{"status": "READY"}]}]
        self.management_status = 200
        self.prediction_status = 200
        self.prediction_seconds = 0.0
        self.captioned = 0
        self.url = ""


@pytest.fixture
def played() -> Iterator[Played]:
    played = Played()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, f'CaptionedImages{{ModelName="caption",}} {float(played.captioned)}\n'.encode())
            else:
                self._answer(played.management_status, json.dumps(played.model).encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(played.prediction_seconds)
            self._answer(played.prediction_status, b"{}")

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    played.url = f"http://127.0.0.1:{server.server_port}"
    yield played
    server.shutdown()
    thread.join()
    server.server_close()


def workers(*states: str) -> list[dict[str, Any]]:
    return [{"minWorkers": 1, "workers": [{"status": state} for state in states]}]


def test_the_canary_is_an_image() -> None:
    assert decode(CANARY, ImageLimits()).image.getpixel((3, 3)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("states", "all_ready", "any_ready"),
    [(["READY"], True, True), (["READY", "UNLOADING"], False, True), (["UNLOADING"], False, False), ([], False, False)],
)
def test_ready_means_all_workers_or_at_least_one(played: Played, states: list[str], all_ready: bool, any_ready: bool) -> None:
    played.model = workers(*states)
    assert (not_ready(played.url, "caption") is None) is all_ready
    assert (not_ready(played.url, "caption", any_worker=True) is None) is any_ready


@pytest.mark.parametrize(("status", "alive"), [(200, True), (503, True), (400, True), (404, True), (500, False), (507, False)])
def test_what_counts_as_a_sign_of_life(played: Played, status: int, alive: bool) -> None:
    played.prediction_status = status
    assert (not_alive(played.url, played.url, "caption") is None) is alive
    assert (no_caption(played.url, "caption") is None) is (status == 200)


def test_silence_is_death_unless_somebody_switched_the_model_off(played: Played) -> None:
    played.prediction_seconds = 2
    assert "has not answered" in str(not_alive(played.url, played.url, "caption", timeout=0.2))
    played.model = [{"minWorkers": 0, "workers": []}]
    assert not_alive(played.url, played.url, "caption", timeout=0.2) is None
    played.management_status, played.model = 404, {}
    assert switched_off(played.url, "caption")


def test_a_closed_port_is_neither_ready_nor_alive() -> None:
    assert "does not answer" in str(not_ready("http://127.0.0.1:9", "caption"))
    assert "does not answer" in str(not_alive("http://127.0.0.1:9", "http://127.0.0.1:9", "caption"))
    assert work_done("http://127.0.0.1:9") is None


def test_the_command_says_why(played: Played) -> None:
    played.model = workers("UNLOADING")
    command = [sys.executable, "-m", "scripts.probe", "--management", played.url, "--inference", played.url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (1, "not ready: model caption has workers in the states UNLOADING\n")
    done = subprocess.run([*command, "--liveness"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def watchdog(played: Played) -> Watchdog:
    addresses = {f"{name}_address": played.url for name in ("inference", "management", "metrics")}
    return Watchdog(TorchServe(addresses), seconds=0.4)


def looked(watchdog: Watchdog, times: int = 4) -> None:
    for _ in range(times):
        watchdog._next = 0
        watchdog.look()
        time.sleep(0.2)


def test_the_supervisor_ends_a_service_that_captions_nothing(played: Played, watchdog: Watchdog) -> None:
    looked(watchdog)
    played.prediction_status, played.model = 500, workers("UNLOADING")
    with pytest.raises(ServerError, match=r"nothing has been captioned .* states UNLOADING"):
        looked(watchdog)


def test_the_supervisor_leaves_a_busy_service_alone(played: Played, watchdog: Watchdog) -> None:
    """Its own image finds the queue full, but others' are captioned."""
    played.prediction_status = 503
    for _ in range(6):
        played.captioned += 1
        looked(watchdog, times=1)


@pytest.mark.parametrize("status", [400, 404])
def test_the_supervisor_is_patient_with_refusals(played: Played, watchdog: Watchdog, status: int) -> None:
    played.prediction_status = status
    looked(watchdog)
