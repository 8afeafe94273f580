"""nginx in front of TorchServe: the old URL, one shape of errors, limits, and nothing else reachable."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from scripts.edge import Edge, EdgeError, swagger_ui_directory
from scripts.server import TorchServe, free_settings
from tests.conftest import ROOT, missing, running_edge

CAT = (ROOT / "samples/cat.jpg").read_bytes()
JSON_TYPE = "application/json; charset=utf-8"


def error_of(response: requests.Response) -> str:
    """The code of an error answer, which must have the shape of the contract."""
    assert response.headers["content-type"] == JSON_TYPE
    content = response.json()
    assert set(content) == {"error"}
    assert set(content["error"]) == {"code", "message"}
    assert content["error"]["message"]
    return str(content["error"]["code"])


# ---- with TorchServe behind it ----


@pytest.mark.server
def test_the_old_clients_request_gets_the_old_answer_and_more(edge: Edge, server: TorchServe) -> None:
    answer = requests.post(f"{edge.url}/predict", files={"image": CAT}, timeout=60)
    direct = requests.post(f"{server.address('inference')}/predictions/caption", files={"image": CAT}, timeout=60)
    assert (answer.status_code, answer.headers["content-type"]) == (200, JSON_TYPE)
    content, expected = answer.json(), direct.json()
    assert {key: content[key] for key in ("captions", "image", "model")} == {
        key: expected[key] for key in ("captions", "image", "model")
    }
    plain = {"files": {"image": CAT}, "data": {"length_penalty": "0"}}  # as chainer-caption sorted them
    captions = requests.post(f"{edge.url}/predict", timeout=60, **plain).json()["captions"]
    likelihoods = [caption["log_likelihood"] for caption in captions]
    assert likelihoods == sorted(likelihoods, reverse=True)
    assert all(isinstance(caption["sentence"], list) for caption in content["captions"])


@pytest.mark.server
def test_parameters_in_the_query_string_count(edge: Edge) -> None:
    def captions(path: str) -> int:
        response = requests.post(f"{edge.url}{path}", files={"image": CAT}, timeout=60)
        assert response.status_code == 200
        return len(response.json()["captions"])

    assert captions("/predict?beam_size=3&num_captions=2") == 2
    assert captions("/predictions/caption?num_captions=1") == 1
    assert captions("/predictions/caption/1.0?num_captions=1") == 5  # TorchServe drops it here; documented
    wrong = requests.post(f"{edge.url}/predict?temperature=1", files={"image": CAT}, timeout=60)
    assert (wrong.status_code, error_of(wrong)) == (400, "InvalidParameter")


@pytest.mark.server
@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("/predictions/caption", {"data": b""}),
        ("/predictions/caption", {"files": {"image": CAT[:9000]}}),
        ("/predictions/caption", {"files": {"image": CAT}, "data": {"beam_size": "11"}}),
        ("/predictions/caption", {"data": b"\xff\xd8" + bytes(21 * 2**20)}),
        ("/predictions/caption", {"data": b"<svg/>", "headers": {"Content-Type": "image/svg+xml"}}),
        ("/v1/models/caption:predict", {"json": {"instances": []}}),
        ("/v2/models/caption/infer", {"json": {"inputs": []}}),
    ],
    ids=["no image", "half a photo", "parameter", "too many bytes", "SVG", "V1", "V2"],
)
def test_what_the_handler_says_arrives_unchanged(edge: Edge, server: TorchServe, path: str, options: dict[str, Any]) -> None:
    ours = requests.post(edge.url + path, timeout=60, **options)
    direct = requests.post(server.address("inference") + path, timeout=60, **options)
    assert ours.status_code == direct.status_code >= 400
    assert ours.content == direct.content
    error_of(ours)


@pytest.mark.server
def test_what_torchserve_itself_says_comes_in_our_shape(edge: Edge) -> None:
    for path in ("/predictions/unknown", "/predictions/caption/9.9", "/v1/models/unknown:predict", "/v2/models/unknown/infer"):
        response = requests.post(edge.url + path, json={}, timeout=60)
        assert (response.status_code, error_of(response)) == (404, "NotFound"), path
    assert requests.get(f"{edge.url}/ping", timeout=60).json() == {"status": "Healthy"}


@pytest.mark.server
def test_what_torchserve_cannot_read_is_refused_in_our_shape(edge: Edge) -> None:
    def refused(query: str = "", **headers: str) -> tuple[int, str]:
        response = requests.post(f"{edge.url}/predict{query}", data=CAT, headers=headers, timeout=60)
        return response.status_code, error_of(response)

    host, port = edge.url.removeprefix("http://").split(":")
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=60)) as connection:
        connection.request("POST", "/predict?beam_size=%zz", body=CAT)  # requests would put it right
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["error"]["code"]) == (400, "InvalidRequest")
    assert refused("?x=" + "a" * 3600) == (414, "InvalidRequest")
    assert refused("?x=" + "a" * 3400) == (400, "InvalidParameter")
    json_type = "application/json; " + "a" * 7000
    assert refused(**{"Content-Type": "image/jpeg", "Cookie": "a" * 7000, "X-A": "a" * 7000}, query="?a=1")[0] == 400
    assert refused(**{"Content-Type": json_type}, query="?a=1") == (400, "InvalidParameter")


@pytest.mark.server
def test_a_photo_in_pieces_without_a_length(edge: Edge) -> None:
    pieces = (CAT[start : start + 5000] for start in range(0, len(CAT), 5000))
    response = requests.post(f"{edge.url}/predict", data=pieces, headers={"Content-Type": "image/jpeg"}, timeout=60)
    assert response.status_code == 200
    assert len(response.json()["captions"]) == 5


# ---- with a stub behind it ----


class Stub(http.server.ThreadingHTTPServer):
    """A server that remembers what it was asked, and answers as the test says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _StubHandler)
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        self.answer: tuple[int, str] = (200, "{}")
        self.before_answer: Callable[[], object] = lambda: None

    def handle_error(self, *_: object) -> None:
        """A client that gave up is part of the tests."""


class _StubHandler(http.server.BaseHTTPRequestHandler):
    server: Stub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        if "content-length" in self.headers:
            body = self.rfile.read(int(self.headers["content-length"]))
        else:
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        self.server.before_answer()
        status, text = self.server.answer
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_OPTIONS = do_PUT = do_DELETE = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def upstream(stub: Stub) -> Iterator[Stub]:
    stub.asked.clear()
    yield stub
    stub.answer, stub.before_answer = (200, "{}"), lambda: None


@pytest.fixture(scope="module")
def stubbed(stub: Stub) -> Iterator[Edge]:
    """An edge in front of the stub, with small limits."""
    settings = {
        "EDGE_UPSTREAM": f"127.0.0.1:{stub.server_port}",
        "EDGE_MAX_BODY": "100k",
        "EDGE_TIMEOUT": "1s",
        "EDGE_RATE": "1000r/s",
        "EDGE_BURST": "1000",
    }
    with running_edge(settings) as running:
        yield running


TORCHSERVES_ERROR = json.dumps({"code": 503, "type": "ServiceUnavailableException", "message": "Model has no worker"})


@pytest.mark.parametrize(
    ("status", "code", "retry_after"),
    [
        (404, "NotFound", None),
        (405, "MethodNotAllowed", None),
        (500, "InternalError", None),
        (503, "ServiceUnavailable", "5"),
        (507, "InternalError", None),
    ],
)
def test_torchserves_errors_are_translated(
    stubbed: Edge, upstream: Stub, status: int, code: str, retry_after: str | None
) -> None:
    upstream.answer = (status, TORCHSERVES_ERROR)
    response = requests.post(f"{stubbed.url}/predict", data=CAT, timeout=10)
    assert (response.status_code, error_of(response)) == (status, code)
    assert response.headers.get("retry-after") == retry_after
    assert "worker" not in response.text or code == "ServiceUnavailable"


def test_no_answer_in_time_is_504(stubbed: Edge, upstream: Stub) -> None:
    waited = threading.Event()
    upstream.before_answer = lambda: waited.wait(10)
    response = requests.post(f"{stubbed.url}/predict", data=CAT, timeout=10)
    waited.set()
    assert (response.status_code, error_of(response), response.headers["retry-after"]) == (504, "Timeout", "5")


def test_nothing_behind_it_is_502_and_the_page_is_there_all_the_same() -> None:
    with running_edge({"EDGE_UPSTREAM": "127.0.0.1:1"}) as alone:
        response = requests.post(f"{alone.url}/predict", data=CAT, timeout=10)
        assert (response.status_code, error_of(response)) == (502, "ServiceUnavailable")
        assert response.headers["retry-after"] == "5"
        assert requests.get(alone.url, timeout=10).headers["content-type"] == "text/html; charset=utf-8"


def test_too_many_requests_are_429(stub: Stub) -> None:
    settings = {"EDGE_UPSTREAM": f"127.0.0.1:{stub.server_port}", "EDGE_RATE": "1r/m", "EDGE_BURST": "2"}
    with running_edge(settings) as strict:
        responses = [requests.post(f"{strict.url}/predict", data=CAT, timeout=10) for _ in range(4)]
        assert [response.status_code for response in responses] == [200, 200, 200, 429]
        assert error_of(responses[3]) == "TooManyRequests"
        assert responses[3].headers["retry-after"] == "1"
        assert requests.get(strict.url, timeout=10).status_code == 200  # pages are not counted


@pytest.mark.parametrize("is_chunked", [False, True])
def test_too_large_a_request_is_413(stubbed: Edge, is_chunked: bool) -> None:
    body = bytes(200_000)
    response = requests.post(f"{stubbed.url}/predict", data=iter([body]) if is_chunked else body, timeout=10)
    assert (response.status_code, error_of(response)) == (413, "ImageTooLarge")


RAW = [
    (b"nonsense\r\n\r\n", 400, "InvalidRequest"),
    (b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: nine\r\n\r\n", 400, "InvalidRequest"),
    (b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: rot13\r\n\r\n", 501, "InvalidRequest"),
    (b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "InvalidRequest"),
    (b"GET / HTTP/1.1\r\nHost: x\r\nCookie: " + b"x" * 40_000 + b"\r\n\r\n", 431, "InvalidRequest"),
    (b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n", 405, "MethodNotAllowed"),
    (b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", 400, "InvalidRequest"),
    (b"GET /_error HTTP/1.1\r\nHost: x\r\n\r\n", 404, "NotFound"),
    (b"GET /docs/ HTTP/1.1\r\nHost: x\r\n\r\n", 200, None),
    (b"GET /samples/ HTTP/1.1\r\nHost: x\r\n\r\n", 404, "NotFound"),
]


@pytest.mark.parametrize(("sent", "status", "code"), RAW, ids=[str(sent[:24]) for sent, _, _ in RAW])
def test_what_is_no_proper_request_is_refused_in_json(stubbed: Edge, sent: bytes, status: int, code: str | None) -> None:
    host, port = stubbed.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(sent)
        response = http.client.HTTPResponse(connection)
        response.begin()
        body = response.read()
    assert response.status == status
    if code is not None:
        assert json.loads(body)["error"]["code"] == code
        assert response.headers["content-type"] == JSON_TYPE
        assert response.headers["x-content-type-options"] == "nosniff"


def test_a_method_that_is_not_allowed_says_which_is(stubbed: Edge, upstream: Stub) -> None:
    for method, path, allowed in [
        ("GET", "/predict", "POST"),
        ("PUT", "/v1/models/caption:predict", "POST"),
        ("OPTIONS", "/predictions/caption", "POST"),
        ("POST", "/", "GET, HEAD"),
        ("DELETE", "/openapi.json", "GET, HEAD"),
        ("POST", "/ping", "GET, HEAD"),
    ]:
        response = requests.request(method, stubbed.url + path, timeout=10)
        assert (response.status_code, error_of(response)) == (405, "MethodNotAllowed"), path
        assert response.headers["allow"] == allowed
    assert not upstream.asked


CLOSED = [
    "/models",
    "/models/caption",
    "/models/caption/invoke",
    "/workflows",
    "/wfpredict/caption",
    "/explanations/caption",
    "/invocations",
    "/api-description",
    "/metrics",
    "/v1/models/caption:explain",
    "/v2/models/caption/versions/1/infer",
    "/predictions/caption/1.0/more",
    "/predictions/a%2fb%2fc",
    "/predictions/caption%0d%0aX: y",
]


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_only_captions_are_reachable(stubbed: Edge, upstream: Stub, method: str, path: str) -> None:
    host, port = stubbed.url.removeprefix("http://").split(":")
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=10)) as connection:
        connection.putrequest(method, path.replace(" ", "%20"), skip_accept_encoding=True)
        connection.endheaders()
        response = connection.getresponse()
        assert response.status in (404, 405)
        assert json.loads(response.read())["error"]["code"] in ("NotFound", "MethodNotAllowed")
    assert not upstream.asked


@pytest.mark.parametrize("path", ["/models/../predictions/caption", "//predictions/caption", "/wfpredict/x/%2e%2e/../predict"])
def test_torchserve_sees_only_addresses_that_the_edge_wrote(stubbed: Edge, upstream: Stub, path: str) -> None:
    host, port = stubbed.url.removeprefix("http://").split(":")
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=10)) as connection:
        connection.request("POST", path, body=b"x")
        connection.getresponse().read()
    assert [asked for asked, _, _ in upstream.asked] in ([], ["/models/caption/invoke"])


def test_only_harmless_headers_pass(stubbed: Edge, upstream: Stub) -> None:
    sent = {
        "describe": "True",
        "explain": "True",
        "Cookie": "a=b",
        "X-Forwarded-For": "1.2.3.4",
        "Content-Encoding": "gzip",
        "Content-Type": "image/jpeg",
        "Authorization": "Bearer client",
        "X-Request-Id": "order-66",
    }
    response = requests.post(f"{stubbed.url}/predict", data=CAT, headers=sent, timeout=10)
    ((_, got, body),) = upstream.asked
    assert body == CAT
    assert response.headers["x-request-id"] == got["x-request-id"] == "order-66"
    assert got["content-type"] == "image/jpeg"
    assert got["authorization"] == "Bearer client"
    assert set(got) == {"host", "content-length", "content-type", "authorization", "x-request-id"}


def test_a_request_id_is_made_where_none_can_be_kept(stubbed: Edge, upstream: Stub) -> None:
    for given in ({}, {"X-Request-Id": "a b<script>"}, {"X-Request-Id": "x" * 200}):
        response = requests.post(f"{stubbed.url}/predict", data=CAT, headers=given, timeout=10)
        assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
    assert len({got["x-request-id"] for _, got, _ in upstream.asked}) == 3


def test_the_edges_own_token_replaces_the_clients(stub: Stub, upstream: Stub) -> None:
    with running_edge({"EDGE_UPSTREAM": f"127.0.0.1:{stub.server_port}", "EDGE_TOKEN": "secret"}) as trusted:
        requests.post(f"{trusted.url}/predict", data=CAT, headers={"Authorization": "Bearer client"}, timeout=10)
    assert upstream.asked[0][1]["authorization"] == "Bearer secret"


def test_an_upload_is_never_on_a_disk(stubbed: Edge, upstream: Stub) -> None:
    files: list[str] = []
    nginx = psutil.Process(stubbed.pid or 0)

    def look() -> None:
        for process in (nginx, *nginx.children()):
            files.extend(file.path for file in process.open_files() if "/tmp/" in file.path.removeprefix("/tmp"))

    upstream.before_answer = look
    upstream.answer = (200, json.dumps("x" * 2**21))
    response = requests.post(f"{stubbed.url}/predict", data=bytes(100_000), timeout=10)
    assert len(response.content) > 2**21
    assert not files


def test_every_answer_has_the_security_headers(stubbed: Edge) -> None:
    for response in (
        requests.get(stubbed.url, timeout=10),
        requests.get(f"{stubbed.url}/app.js", timeout=10),
        requests.get(f"{stubbed.url}/docs", timeout=10),
        requests.post(f"{stubbed.url}/predict", data=CAT, timeout=10),
        requests.get(f"{stubbed.url}/nothing", timeout=10),
    ):
        headers = response.headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["server"] == "nginx"  # no version
        assert "strict-transport-security" not in headers
    assert requests.post(f"{stubbed.url}/predict", data=CAT, timeout=10).headers["cache-control"] == "no-store"


def test_tls(stub: Stub, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        missing("openssl is missing, which makes the test's certificate")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-keyout", key, "-out", certificate),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = {
        "EDGE_UPSTREAM": f"127.0.0.1:{stub.server_port}",
        "EDGE_TLS_LISTEN": address,
        "EDGE_TLS_CERTIFICATE": str(certificate),
        "EDGE_TLS_KEY": str(key),
    }
    with running_edge(settings):
        response = requests.post(f"https://{address}/predict", data=CAT, verify=str(certificate), timeout=10)
        assert response.status_code == 200
        assert response.headers["strict-transport-security"] == "max-age=31536000"
        plain = requests.get(f"http://{address}/", timeout=10)
        assert (plain.status_code, error_of(plain)) == (400, "InvalidRequest")


# ---- as a process ----


def test_a_taken_port_is_named(stubbed: Edge) -> None:
    with pytest.raises(EdgeError, match=r"port \d+ \(edge\) cannot be used"):
        Edge({"EDGE_LISTEN": stubbed.settings["EDGE_LISTEN"]}).start()


def run(command: list[str], folder: Path, **more: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"TMPDIR": str(folder)} | more.pop("env", {})
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **more,
    )


def can_read(python: str, **user: Any) -> bool:
    """Whether a user can run the edge from this checkout with this interpreter."""
    with contextlib.suppress(OSError):
        command = [python, "-B", "-c", "import scripts.edge"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=False, **user).returncode == 0
    return False


def printed_until(process: subprocess.Popen[str], beginning: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return lines
    raise AssertionError("".join(lines))


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """A directory for temporary files that every user can reach, as /tmp is; pytest's own are private."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    return tmp_path


def test_any_user_can_run_it_and_nothing_is_left(stubbed: Edge, open_folder: Path) -> None:
    python, more = sys.executable, {}
    if os.geteuid() == 0:
        more = {"user": "nobody", "group": "nogroup", "extra_groups": ()}
        found = [path for path in (sys.executable, "/usr/bin/python3") if can_read(path, **more)]
        if not found:
            pytest.skip("nobody can read neither this checkout nor a Python")
        python = found[0]
        shutil.chown(open_folder, "nobody", "nogroup")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = {
        "EDGE_LISTEN": listen,
        "EDGE_UPSTREAM": "127.0.0.1:1",
        "EDGE_SWAGGER_UI": str(open_folder.parent / "swagger-ui"),
    }
    shutil.copytree(swagger_ui_directory(), settings["EDGE_SWAGGER_UI"], dirs_exist_ok=True)
    process = run([python, "-m", "scripts.edge"], open_folder, env=settings, **more)
    try:
        assert f"ready: http://{listen}" in printed_until(process, "ready")[-1]
        assert requests.get(f"http://{listen}/app.js", timeout=10).status_code == 200
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.communicate()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert not list(open_folder.iterdir())


@pytest.mark.slow
@pytest.mark.server
def test_serve_with_web_starts_and_stops_both(server: TorchServe, stubbed: Edge, open_folder: Path) -> None:
    settings = free_settings() | {"model_store": server.settings["model_store"]}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {f"TS_{key.upper()}": value for key, value in settings.items()} | {"EDGE_LISTEN": listen}
    process = run([sys.executable, "-m", "scripts.server", "--web"], open_folder, env=environment)
    try:
        assert f"web   http://{listen}\n" in printed_until(process, "stop")
        assert requests.post(f"http://{listen}/predict", files={"image": CAT}, timeout=60).status_code == 200
        family = psutil.Process(process.pid).children(recursive=True)
        assert {"nginx", "java"} <= {member.name() for member in family}
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert not list(open_folder.iterdir())
