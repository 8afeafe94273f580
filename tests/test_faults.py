"""What clients see when something breaks: workers killed, hanging, out of memory, a full queue, a service that is a zombie.

Every request gets an answer, and the service is whole again afterwards, or ends. docs/operations.md has it as a table.
"""

from __future__ import annotations

import base64
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil
import pytest
import requests
import yaml

from scripts import scorecard
from scripts.package_mar import package
from scripts.probe import not_alive, not_ready, switched_off
from scripts.scorecard import Answer, Service
from scripts.server import CONFIG, TorchServe, free_settings
from tests import corpus
from tests.conftest import ROOT, SAMPLES

pytestmark = [pytest.mark.server, pytest.mark.slow]

CAT = next(path.read_bytes() for path in SAMPLES if path.stem == "cat")
QUEUE, BATCH = 20, 8
RESPONSE_SECONDS, ANSWER_SECONDS = 22, 14


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """A service that waits for seconds where the real one waits for minutes, with a short queue."""
    folder = tmp_path_factory.mktemp("fragile")
    settings = yaml.safe_load((ROOT / "deploy/torchserve/model-config.yaml").read_text())
    settings |= {
        "jobQueueSize": QUEUE,
        "batchSize": BATCH,
        "responseTimeout": RESPONSE_SECONDS,
        "minWorkers": 1,
        "maxWorkers": 1,
    }
    (folder / "model-config.yaml").write_text(yaml.safe_dump(settings))
    package(ROOT / "weights/en", folder / "caption.mar", name="caption", model_config=folder / "model-config.yaml")
    config = folder / "config.properties"
    config.write_text(CONFIG.read_text() + f"\nvmargs=-Dcaption.answer.seconds={ANSWER_SECONDS} -Dcaption.idle.seconds=4\n")
    with TorchServe(free_settings() | {"model_store": str(folder)}, config=config) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def service(fragile: TorchServe) -> Iterator[Service]:
    service = Service(fragile.address("inference"), fragile.address("management"))
    assert service.predict(CAT).status == 200
    yield service
    fragile.wait_until_ready()
    assert service.predict(CAT).status == 200


def until(reached: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def error_code(answer: Answer) -> str:
    return json.loads(answer.body)["error"]["code"]


def test_a_killed_worker_costs_its_own_requests_and_no_more(service: Service) -> None:
    before = scorecard.temporary_files(service)
    result = scorecard.kill_worker(service)
    print(f"kill -9: {result.lost} of {result.sent} lost, {result.recovery_s} s to the next caption")
    # Answered, each of them: 503 where this machine needs longer to start a worker than this service lets a request wait.
    assert set(result.lost) <= {"500", "503", "507"}
    # those in the batch; what waits in the queue is captioned later
    assert result.lost.get("500", 0) + result.lost.get("507", 0) <= BATCH
    assert result.sent > sum(result.lost.values())
    left = {path for path in scorecard.temporary_files(service) - before if not path.name.startswith(".ts.sock")}
    assert left == set()


def test_a_worker_that_hangs_is_replaced_and_nobody_waits_without_end(service: Service) -> None:
    result = scorecard.kill_worker(service, number=signal.SIGSTOP)
    print(f"hanging worker: {result.lost} of {result.sent} lost, {result.recovery_s} s to the next caption")
    assert set(result.lost) <= {"500", "503"}
    assert "503" in result.lost  # NoAnswer, before TorchServe itself has noticed


def test_a_full_queue_is_said_at_once_and_what_waits_is_captioned(service: Service) -> None:
    (worker,) = service.workers()
    os.kill(worker, signal.SIGSTOP)
    over = QUEUE + BATCH + 10
    refused: list[Answer] = []
    captioned: list[Answer] = []

    def send(_: int) -> None:
        answer = service.predict(CAT)
        (captioned if answer.status == 200 else refused).append(answer)

    with ThreadPoolExecutor(over) as pool:
        sent = [pool.submit(send, number) for number in range(over)]
        with suppress(AssertionError):
            until(lambda: len(refused) >= 10, seconds=ANSWER_SECONDS - 6)
        early = len(refused)
        os.kill(worker, signal.SIGCONT)
        for one in sent:
            one.result()
    assert early >= 10  # while no worker did anything
    assert {answer.status for answer in refused} == {503}
    assert {error_code(answer) for answer in refused} == {"Overloaded"}
    assert {answer.headers["retry-after"] for answer in refused} == {"1"}
    assert len(captioned) + len(refused) == over
    assert len(captioned) >= QUEUE


def test_without_workers_a_request_is_answered_all_the_same(service: Service, fragile: TorchServe) -> None:
    model = fragile.address("management") + "/models/caption"
    answers: list[Answer] = []
    waiting = threading.Thread(target=lambda: answers.append(service.predict(CAT, timeout=120)))
    try:
        requests.put(model, params={"min_worker": 0, "max_worker": 0, "synchronous": "true"}, timeout=60).raise_for_status()
        until(lambda: service.workers() == [])
        assert not_ready(fragile.address("management"), "caption", any_worker=True) == "model caption has no workers"
        assert switched_off(fragile.address("management"), "caption")
        # somebody wanted it so: nothing to start anew
        assert not_alive(fragile.address("management"), fragile.address("inference"), "caption", timeout=1) is None
        waiting.start()
        waiting.join()
    finally:
        requests.put(model, params={"min_worker": 1, "max_worker": 1, "synchronous": "true"}, timeout=120)
    assert answers[0].status == 503
    assert error_code(answers[0]) == "Overloaded"


def test_a_connection_on_which_nothing_comes_is_closed(service: Service, fragile: TorchServe) -> None:
    host, port = fragile.address("inference").removeprefix("http://").split(":")
    for sent in (b"", b"POST /predictions/caption HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc"):
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(sent)
            with suppress(ConnectionResetError):
                assert connection.recv(100) == b""


def test_out_of_memory_fails_the_request_and_not_the_service(service: Service) -> None:
    """The request is larger by far than what a worker may have freed since it was started."""
    image = {"b64": base64.b64encode(CAT + bytes(14 * 2**20)).decode()}
    large = corpus.RequestCase("", json.dumps({"instances": [image] * 3}).encode(), corpus.ANSWERED, corpus.JSON)
    assert service.send(large).status == 200
    worker = psutil.Process(service.workers()[0])
    before = resource.prlimit(worker.pid, resource.RLIMIT_AS)
    resource.prlimit(worker.pid, resource.RLIMIT_AS, (worker.memory_info().vms + 2**20, before[1]))
    try:
        status = service.send(large).status
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(worker.pid, resource.RLIMIT_AS, before)
    assert status in {413, 500, 503, 507}
    until(lambda: service.predict(CAT).status == 200)


def probe(server: TorchServe, *options: str) -> tuple[int, str]:
    """What the container's and the pod's probes run: the status, and what is said."""
    command = [sys.executable, "-m", "scripts.probe", *options]
    for name in ("management", "inference"):
        command += [f"--{name}", server.address(name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stderr.strip()


def test_a_model_that_still_loads_is_not_ready(fragile: TorchServe) -> None:
    """TorchServe's own /ping says Healthy meanwhile, hence our probes."""
    with TorchServe(free_settings() | {"model_store": fragile.settings["model_store"]}, config=fragile.config) as starting:
        until(lambda: "has workers in the states" in str(not_ready(starting.address("management"), "caption")))
        assert requests.get(f"{starting.address('inference')}/ping", timeout=10).json() == {"status": "Healthy"}
        for question in ([], ["--readiness"], ["--readiness", "--canary"]):
            status, said = probe(starting, *question)
            assert status == 1
            assert said.startswith("not ready: model caption has workers in the states")
        assert probe(starting, "--wait", "120") == (0, "")
        for question in (["--readiness", "--canary"], ["--liveness"]):
            assert probe(starting, *question) == (0, "")


def test_of_two_workers_one_is_killed(service: Service, fragile: TorchServe) -> None:
    """Not all is well, but the other one answers: neither to be taken from the load balancer, nor to be started anew."""
    management = fragile.address("management")

    def scale(workers: int) -> None:
        numbers = {"min_worker": workers, "max_worker": workers}
        requests.put(f"{management}/models/caption", params=numbers | {"synchronous": "true"}, timeout=120).raise_for_status()

    scale(2)
    try:
        until(lambda: not_ready(management, "caption") is None)
        os.kill(service.workers()[0], signal.SIGKILL)
        until(lambda: not_ready(management, "caption") is not None)
        assert not_ready(management, "caption", any_worker=True) is None
        assert not_alive(management, fragile.address("inference"), "caption") is None
        assert "READY" in str(not_ready(management, "caption")), "the worker was back before the probes were asked"
        until(lambda: not_ready(management, "caption") is None)
    finally:
        scale(1)


def test_all_workers_hang(service: Service, fragile: TorchServe) -> None:
    for worker in service.workers():
        os.kill(worker, signal.SIGSTOP)
    try:
        silent = "the inference API has not answered for 2 seconds"
        assert probe(fragile, "--liveness", "--timeout", "2") == (1, f"not alive: {silent}")
        assert probe(fragile, "--readiness", "--canary", "--timeout", "2") == (1, f"not ready: {silent}")
    finally:
        for worker in service.workers():
            os.kill(worker, signal.SIGCONT)
    assert probe(fragile, "--liveness", "--wait", "60") == (0, "")


def test_without_file_descriptors_new_clients_wait_until_idle_ones_are_gone(service: Service, fragile: TorchServe) -> None:
    host, port = fragile.address("inference").removeprefix("http://").split(":")
    assert fragile.pid is not None
    java = psutil.Process(fragile.pid)
    soft, hard = resource.prlimit(java.pid, resource.RLIMIT_NOFILE)
    limit = java.num_fds() + 10
    resource.prlimit(java.pid, resource.RLIMIT_NOFILE, (limit, hard))
    idle = [socket.create_connection((host, int(port))) for _ in range(30)]  # the system takes them, for the JVM to fetch
    try:
        until(lambda: java.num_fds() >= limit)
        assert service.predict(CAT).status == 200
    finally:
        resource.prlimit(java.pid, resource.RLIMIT_NOFILE, (soft, hard))
        for connection in idle:
            connection.close()


@contextmanager
def supervised(folder: Path, output: IO[str] | int) -> Iterator[tuple[subprocess.Popen[str], Service]]:
    """`scripts.server` as whoever deploys it runs it, patient for seconds instead of minutes."""
    store = folder / "store"
    store.mkdir()
    package(
        ROOT / "weights/en", store / "caption.mar", name="caption", model_config=ROOT / "deploy/torchserve/model-config.yaml"
    )
    settings = free_settings() | {"model_store": str(store)}
    environment = os.environ | {f"TS_{key.upper()}": value for key, value in settings.items()} | {"TMPDIR": str(folder)}
    command = [sys.executable, "-m", "scripts.server", "--stall", "10"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process, Service(settings["inference_address"], settings["management_address"])
        finally:
            process.terminate()  # killed, it would leave TorchServe behind
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Service]]:
    with supervised(tmp_path, subprocess.PIPE) as (process, service):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("stop"):
                break
        yield process, service


def ends_with_a_message(process: subprocess.Popen[str]) -> None:
    """And with status 1, so that it is started anew, and nothing of it is left."""
    family = psutil.Process(process.pid).children(recursive=True)
    assert process.stdout is not None
    printed = process.stdout.read()  # until it has ended
    assert process.wait(timeout=60) == 1
    assert "error: nothing has been captioned for" in printed
    assert "starts it anew" in printed
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def test_a_zombie_ends_so_that_it_is_started_anew(watched: tuple[subprocess.Popen[str], Service]) -> None:
    process, service = watched
    for worker in service.workers():
        os.kill(worker, signal.SIGSTOP)
    ends_with_a_message(process)


def test_a_frontend_that_hangs_is_seen_by_the_probe_and_ends(watched: tuple[subprocess.Popen[str], Service]) -> None:
    process, service = watched
    (java,) = psutil.Process(process.pid).children()
    java.suspend()
    asked = time.monotonic()
    assert service.management is not None
    reason = not_alive(service.management, service.inference, "caption", timeout=2)
    assert reason == "the inference API has not answered for 2 seconds"
    assert not_ready(service.management, "caption", timeout=2) == "the management API does not answer (ReadTimeout)"
    assert time.monotonic() - asked < 20
    ends_with_a_message(process)


def test_a_clock_that_jumps_disturbs_nothing(
    fragile: TorchServe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Three days forward and back, for the frontend and the workers. `scripts.server` asks the monotonic clock alone."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None:
        pytest.skip("apt-get install libfaketime")
    clock = tmp_path / "clock"
    clock.write_text("+0s")
    for name, value in (("TIMESTAMP_FILE", str(clock)), ("NO_CACHE", "1"), ("DONT_FAKE_MONOTONIC", "1")):
        monkeypatch.setenv(f"FAKETIME_{name}", value)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    with TorchServe(free_settings() | {"model_store": fragile.settings["model_store"]}) as running:
        monkeypatch.undo()
        running.wait_until_ready()
        service = Service(running.address("inference"), running.address("management"))
        workers = service.workers()
        assert workers
        for offset in ("+3d", "-3d", "+0s"):
            clock.write_text(offset)
            assert service.predict(CAT).status == 200
            time.sleep(2)
        assert service.workers() == workers
    days = re.findall(r'^\{"time":"(.{10})', capfd.readouterr().out, re.MULTILINE)
    assert len(set(days)) == 3, days  # it did jump


def test_a_full_disk_under_the_log_stops_nothing(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full, supervised(tmp_path, full) as (process, service):
        assert service.management is not None
        management = service.management
        until(lambda: process.poll() is not None or not_ready(management, "caption") is None, seconds=180)
        time.sleep(2)  # it has said by now that it is ready
        answers = [service.predict(photo).status for photo in (CAT, b"no image", CAT)]
        assert answers == [200, 400, 200]
        assert process.poll() is None
