"""The whole service over HTTP: a real TorchServe process with the embedded model."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from scripts import doctor
from scripts.server import TorchServe, free_settings
from tests.conftest import ROOT

pytestmark = pytest.mark.server

CAT = (ROOT / "samples/cat.jpg").read_bytes()
B64 = base64.b64encode(CAT).decode()
JSON_TYPE = "application/json; charset=utf-8"


@pytest.fixture(scope="module")
def url(server: TorchServe) -> str:
    return server.address("inference") + "/predictions/caption"


@pytest.fixture(scope="module", autouse=True)
def no_worker_is_restarted(server: TorchServe) -> Any:
    """Whatever the tests send, the same worker processes answer at the end, and nothing was a 5xx."""
    before = worker_processes(server)
    yield
    assert worker_processes(server) == before
    metrics = requests.get(server.address("metrics") + "/metrics", timeout=10).text
    assert sum(map(float, re.findall(r"^Requests5XX\{.*\} (\S+)", metrics, re.MULTILINE))) == 0


def worker_processes(server: TorchServe) -> list[int]:
    (model,) = requests.get(server.address("management") + "/models/caption", timeout=10).json()
    return [worker["pid"] for worker in model["workers"]]


def post(url: str, **options: Any) -> requests.Response:
    response = requests.post(url, timeout=60, **options)
    assert response.headers["content-type"] == JSON_TYPE
    return response


def test_a_photo_gets_captions_in_the_contracts_shape(url: str) -> None:
    response = post(url, files={"image": CAT})
    content = response.json()
    assert response.status_code == 200
    assert set(content) == {"captions", "image", "model", "timing_ms"}
    assert content["image"] == {"width": 451, "height": 300, "format": "JPEG"}
    assert content["model"].items() >= {"name": "caption", "version": "1.0", "language": "en"}.items()
    assert re.fullmatch("sha256:[0-9a-f]{64}", content["model"]["digest"])
    assert len(content["captions"]) == 5
    plain = post(url, files={"image": CAT}, data={"length_penalty": "0"}).json()["captions"]
    scores = [caption["log_likelihood"] for caption in plain]
    assert scores == sorted(scores, reverse=True)
    for caption in content["captions"]:
        assert caption["sentence"][0] == "<sos>"
        assert caption["caption"].split() == [w for w in caption["sentence"] if not w.startswith("<")]
        assert 0 < caption["confidence"] < 1


def test_every_form_of_request_gives_the_same_captions(url: str, server: TorchServe) -> None:
    base = server.address("inference")
    instances = {"instances": [{"b64": B64}, {"image": {"b64": B64}}, B64]}
    tensor = {"id": "x", "inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [B64]}]}
    singles = [
        *(post(url, files={field: CAT}) for field in ("image", "data", "file", "body")),
        post(url, data=CAT, headers={"Content-Type": "image/jpeg"}),
        post(url, data=CAT, headers={"Content-Type": "application/octet-stream"}),
        post(url, data=CAT),
        post(url + "/1.0", data=CAT),
        post(url, json={"image": B64}),
        post(url, json={"image": f"data:image/jpeg;base64,{B64}"}),
        post(url, data=json.dumps({"image": B64}), headers={"Content-Type": "application/json; charset=utf-8"}),
        post(f"{base}/invocations", data=CAT, headers={"Content-Type": "image/jpeg"}),
        post(f"{base}/invocations", json={"image": B64}),
    ]
    v1 = [post(url, json=instances), post(f"{base}/v1/models/caption:predict", json=instances)]
    v2 = [post(url, json=tensor), post(f"{base}/v2/models/caption/infer", json=tensor)]
    results = [response.json() for response in singles]
    results += [result for response in v1 for result in response.json()["predictions"]]
    results += [json.loads(output["data"][0]) for r in v2 for output in r.json()["outputs"] if output["name"] == "result"]
    assert len(results) == 21
    captions = [[c["caption"] for c in result["captions"]] for result in results]
    assert captions == [captions[0]] * len(captions)
    assert [response.json()["id"] for response in v2] == ["x", "x"]


def test_parameters_in_every_place(url: str, server: TorchServe) -> None:
    form = post(url, files={"image": CAT}, data={"beam_size": "3", "num_captions": "2", "max_length": "4"}).json()
    body = post(url, json={"image": B64, "parameters": {"beam_size": 3, "num_captions": 2, "max_length": 4}}).json()
    query = {"beam_size": 3, "num_captions": 2, "max_length": 4}
    invoked = post(
        server.address("inference") + "/invocations", params=query, data=CAT, headers={"Content-Type": "image/jpeg"}
    ).json()
    assert form["captions"] == body["captions"] == invoked["captions"]
    assert len(form["captions"]) == 2
    assert all(len(c["sentence"]) <= 5 for c in form["captions"])
    assert post(url, files={"image": CAT}, data={"min_confidence": "1"}).json()["captions"] == []


def form(image: bytes = CAT, **fields: str) -> dict[str, Any]:
    return {"files": {"image": image}, "data": fields}


def raw(body: bytes, content_type: str = "image/jpeg") -> dict[str, Any]:
    return {"data": body, "headers": {"Content-Type": content_type}}


def as_json(**parameters: Any) -> dict[str, Any]:
    return {"json": {"image": B64, "parameters": parameters}}


WEBP_OF_9400_PIXELS_A_SIDE = b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f\xb7\xe4\x2d\x09" + bytes(9)
BAD: list[tuple[str, dict[str, Any], int, str, str]] = [
    ("no body", {}, 400, "MissingImage", "no image"),
    ("no image field", {"files": {"photo": CAT}}, 400, "MissingImage", "photo"),
    ("empty file", form(b""), 400, "InvalidImage", "empty"),
    ("text", raw(b"hello"), 400, "InvalidImage", "not an image"),
    ("half a photo", form(CAT[: len(CAT) // 2]), 400, "InvalidImage", "cut off"),
    ("beam too wide", form(beam_size="11"), 400, "InvalidParameter", "from 1 to 10"),
    ("beam no number", form(beam_size="wide"), 400, "InvalidParameter", "integer"),
    ("unknown parameter", form(temperature="1"), 400, "InvalidParameter", "beam_size, max_length"),
    ("more captions than beams", as_json(beam_size=2, num_captions=3), 400, "InvalidParameter", "exceed"),
    ("broken JSON", raw(b"{", "application/json"), 400, "InvalidRequest", "JSON"),
    ("broken base64", {"json": {"image": "!!"}}, 400, "InvalidRequest", "base64"),
    ("a URL", {"json": {"image": "http://169.254.169.254/"}}, 400, "InvalidRequest", "URL"),
    ("JSON list", {"json": [B64]}, 400, "InvalidRequest", "object"),
    ("too many instances", {"json": {"instances": ["QUJD"] * 33}}, 400, "InvalidRequest", "32"),
    ("too many bytes", raw(b"\xff\xd8" + bytes(21 * 2**20)), 413, "ImageTooLarge", "20,971,520"),
    ("too many pixels", raw(WEBP_OF_9400_PIXELS_A_SIDE, "image/webp"), 413, "ImageTooLarge", "9400"),
    ("SVG", raw(b"<svg/>", "image/svg+xml"), 415, "UnsupportedFormat", "SVG"),
]


@pytest.mark.parametrize(("options", "status", "code", "said"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_what_is_wrong_is_said_with_status_and_code(
    url: str, options: dict[str, Any], status: int, code: str, said: str
) -> None:
    response = post(url, **options)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert said in error["message"]


def test_bad_requests_do_not_touch_good_ones_beside_them(url: str) -> None:
    """Sent at once, so that TorchServe puts them into the same batches."""
    expected = [c["caption"] for c in post(url, files={"image": CAT}).json()["captions"]]
    cases = [
        ({"files": {"image": CAT}}, 200),
        *((options, status) for _, options, status, _, _ in BAD if "too many" not in _),
    ] * 3
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(lambda case: post(url, **case[0]), cases))
    assert [response.status_code for response in responses] == [status for _, status in cases]
    for response in responses:
        if response.status_code == 200:
            assert [c["caption"] for c in response.json()["captions"]] == expected


def test_alone_and_among_others_a_photo_gets_the_same_scores(url: str) -> None:
    alone = post(url, files={"image": CAT}).json()["captions"]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        others = list(pool.map(lambda _: post(url, files={"image": CAT}).json()["captions"], range(16)))
    for captions in others:
        assert [c["caption"] for c in captions] == [c["caption"] for c in alone]
        for one, other in zip(captions, alone, strict=True):
            assert one["log_likelihood"] == pytest.approx(other["log_likelihood"], abs=1e-4)


def test_the_management_api_describes_the_model(server: TorchServe) -> None:
    (model,) = requests.get(server.address("management") + "/models/caption?customized=true", timeout=10).json()
    described = model["customizedMetadata"]
    assert described["parameters"]["beam_size"].items() >= {"minimum": 1, "maximum": 10, "default": 5}.items()
    assert described["limits"]["max_pixels"] == 50_000_000
    assert described["language"] == "en"


def test_workers_that_openvino_serves_do_without_torch(server: TorchServe) -> None:
    """It takes a second of a cold start and 140 MiB of each worker; TorchServe's worker imports it for nothing."""
    (model,) = requests.get(f"{server.address('management')}/models/caption", timeout=10).json()
    for worker in model["workers"]:
        libraries = Path(f"/proc/{worker['pid']}/maps").read_text()
        assert "openvino" in libraries
        assert "libtorch" not in libraries


def test_java_starts_no_thread_for_a_batch(url: str, server: TorchServe) -> None:
    """It does where its common pool has fewer than two threads, as on two CPUs."""
    post(url, files={"image": CAT})
    names = {path.read_text().strip() for path in Path(f"/proc/{server.pid}/task").glob("*/comm")}
    assert any(name.startswith("ForkJoinPool") for name in names)


def test_prometheus_sees_captions_and_errors(url: str, server: TorchServe) -> None:
    post(url, files={"image": CAT})
    post(url, files={"image": b"x"})
    expected = [
        rf'{name}\{{ModelName="caption",'
        for name in ("CaptionedImages", "Captions", "DecodeMilliseconds", "EncodeMilliseconds", "SearchMilliseconds")
    ] + [r'CaptionErrors\{Code="InvalidImage",']
    missing = expected
    for _ in range(50):  # the handler gives them to TorchServe once a second
        metrics = requests.get(server.address("metrics") + "/metrics", timeout=10).text
        missing = [start for start in expected if not re.search(rf"^{start}.*\}} [1-9]", metrics, re.MULTILINE)]
        if not missing:
            break
        time.sleep(0.1)
    assert not missing


def test_workers_scale_through_the_management_api_while_requests_run(url: str, server: TorchServe) -> None:
    management = server.address("management") + "/models/caption"
    before = worker_processes(server)

    def workers(number: int) -> dict[str, str]:
        return {"min_worker": str(number), "max_worker": str(number), "synchronous": "true"}

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(post, url, files={"image": CAT}) for _ in range(24)]
        up = requests.put(management, params=workers(len(before) + 1), timeout=120)
        assert up.status_code == 200
        assert len(worker_processes(server)) == len(before) + 1
        answers += [pool.submit(post, url, files={"image": CAT}) for _ in range(36)]
        concurrent.futures.wait(answers[:36])  # the new worker has a batch in hand
        down = requests.put(management, params=workers(len(before)), timeout=120)
        assert down.status_code == 200, down.text
        assert [answer.result().status_code for answer in answers] == [200] * len(answers)
    assert worker_processes(server) == before


def test_nobody_can_register_a_model_and_nothing_listens_beyond_the_loopback(server: TorchServe) -> None:
    management = server.address("management")
    for method, path in (("POST", "/models?url=http://127.0.0.1:9/x.mar"), ("DELETE", "/models/caption/1.0")):
        assert requests.request(method, management + path, timeout=10).status_code == 405
    assert server.pid is not None
    listening = []
    for process in (psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # a worker of the scaling test that has just ended
            listening += [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert len(listening) >= 5  # three HTTP and two gRPC addresses
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


def test_the_doctor_finds_a_healthy_service_healthy(url: str, server: TorchServe) -> None:
    post(url, files={"image": CAT})
    addresses = doctor.Addresses(*(server.address(name) for name in ("inference", "management", "metrics")), "caption")
    findings = list(doctor.examine(addresses))
    assert [str(finding) for finding in findings if finding.state == "broken"] == []
    said = "\n".join(map(str, findings))
    ready = len(worker_processes(server))
    for what in (
        "an image is captioned",
        f"version 1.0: {ready} of {ready} workers READY",
        "MiB",
        "file descriptors",
        " 0 5xx",
        "cannot be registered",
    ):
        assert what in said, said


def test_the_doctor_says_what_is_wrong_with_one_that_is_not_there() -> None:
    command = [sys.executable, "-m", "scripts.doctor"]
    for api in ("inference", "management", "metrics"):
        command += [f"--{api}", "http://127.0.0.1:9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "broken   the inference API does not answer" in done.stdout


@pytest.fixture
def started(tmp_path: Path, server: TorchServe) -> Any:
    """`scripts.server` as its own process, as `scripts/serve` ends in it."""
    settings = free_settings() | {"model_store": server.settings["model_store"]}
    environment = os.environ | {f"TS_{k.upper()}": v for k, v in settings.items()} | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.server"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process, settings, tmp_path
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_says_when_it_is_ready_and_leaves_nothing_behind(started: Any, number: signal.Signals) -> None:
    process, settings, folder = started
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("stop"):
            break
    assert any(line.startswith("ready after") for line in printed), printed
    response = requests.post(settings["inference_address"] + "/predictions/caption", files={"image": CAT}, timeout=30)
    assert response.status_code == 200  # "ready" means that the first request is answered
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2  # Java and a worker
    process.send_signal(number)
    process.stdout.read()
    process.wait(timeout=30)
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_a_taken_port_is_named(server: TorchServe) -> None:
    environment = os.environ | {f"TS_{key.upper()}": value for key, value in server.settings.items()}
    done = subprocess.run(
        [sys.executable, "-m", "scripts.server"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    port = server.address("inference").rpartition(":")[2]
    assert done.returncode != 0
    assert f"port {port} (inference) cannot be used" in done.stderr
