"""The images from the Dockerfiles, really built and run: read-only, not as root, without a network.

`scripts/build-image` builds it without a Docker daemon; the tests talk to the service from inside the container. The first
build takes some minutes, later ones come from the cache in build/containers.
"""

from __future__ import annotations

import concurrent.futures
import io
import json
import os
import re
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from handler.checkpoint import Checkpoint, save_checkpoint
from scripts.package_mar import package
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

STORAGE = ROOT / "build/containers"
MEMORY = "3g"
"""As the manifests of deploy/ have it."""
RESTRICTED = (
    *("--pull=never", "--cap-drop", "all", "--read-only", "--security-opt", "no-new-privileges", "--health-interval=disable"),
    *("--ulimit", "nofile=20000:20000", "--ulimit", "nproc=32768:32768"),
)
CAT = (ROOT / "samples/cat.jpg").read_bytes()
CLIENT = """
import sys, requests
from scripts.authorization import bearer
headers = {"Content-Type": "image/jpeg"} | (bearer("inference") if "--token" in sys.argv else {})
answer = requests.post("http://127.0.0.1:8080" + sys.argv[1], data=sys.stdin.buffer.read(), headers=headers, timeout=60)
print(answer.status_code, answer.text)
"""
"""Sends its standard input, and prints the status and the body of the answer."""
BUSY_CLIENT = """
import sys, threading, time, requests
from scripts.authorization import bearer
headers, photo = {"Content-Type": "image/jpeg"} | bearer("inference"), sys.stdin.buffer.read()
def ask(_):
    try:
        status = requests.post("http://127.0.0.1:8080/predictions/caption", data=photo, headers=headers, timeout=60).status_code
    except requests.RequestException as error:
        status = type(error).__name__
    print(f"{status} {time.time()}\\n", end="", flush=True)
threads = [threading.Thread(target=ask, args=(i,)) for i in range(int(sys.argv[1]))]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
"""Sends its standard input many times at once, and prints the status and the time of each answer."""


def podman(*arguments: object, check: bool = True, **options: Any) -> subprocess.CompletedProcess[Any]:
    command = ["bash", "-c", '. "$0/environment" && exec podman --runtime runc "$@"', str(STORAGE), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=False, timeout=120, **options)
    assert not check or done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done


@dataclass(frozen=True)
class Container:
    name: str
    ready_after: float
    """Seconds."""

    def python(self, program: str, *arguments: object, data: bytes = b"") -> str:
        done = podman("exec", "--interactive", self.name, "python", "-c", program, *arguments, input=data)
        return str(done.stdout.decode())

    def request(self, path: str, data: bytes = CAT, *, token: bool = True) -> tuple[int, Any]:
        status, _, body = self.python(CLIENT, path, *(["--token"] if token else []), data=data).partition(" ")
        return int(status), json.loads(body)

    def inspect(self) -> dict[str, Any]:
        (found,) = json.loads(podman("inspect", self.name).stdout)
        return dict(found)


def run(image: str, *options: object) -> Iterator[Container]:
    """A container with as little as it may have, ready; what is said in `options` comes on top."""
    name = f"caption-{uuid.uuid4().hex[:8]}"
    began = time.monotonic()
    podman(
        *("run", "--detach", "--name", name, "--network", "none", "--memory", MEMORY, "--tmpfs", "/tmp:rw,mode=1777"),
        *RESTRICTED,
        *options,
        image,
    )
    try:
        assert podman("healthcheck", "run", name, check=False).returncode != 0, "healthy before the model was loaded"
        while podman("healthcheck", "run", name, check=False).returncode != 0:
            assert podman("inspect", "--format", "{{.State.Running}}", name).stdout.strip() == b"true", logs(name)
            assert time.monotonic() < began + 180, logs(name)
            time.sleep(0.5)
        yield Container(name, time.monotonic() - began)
    finally:
        podman("rm", "--force", "--time", "0", name)


def logs(name: str) -> str:
    done = podman("logs", name)
    return str((done.stdout + done.stderr).decode())


def built(tag: str, *options: str) -> str:
    command = [ROOT / "scripts/build-image", "--tag", tag, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    if done.returncode == 3 and os.environ.get("CI") != "true":
        pytest.skip(f"no image can be built here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return f"localhost/{tag}"


@pytest.fixture(scope="module")
def image() -> str:
    return built("caption-test")


@pytest.fixture(scope="module")
def edge_image() -> str:
    return built("caption-edge-test", "--file", "deploy/nginx/Dockerfile")


@pytest.fixture(scope="module")
def container(image: str) -> Iterator[Container]:
    yield from run(image)


def test_size_and_time_to_ready(image: str, container: Container, capsys: pytest.CaptureFixture[str]) -> None:
    size = int(podman("image", "inspect", "--format", "{{.Size}}", image).stdout)
    used = podman("stats", "--no-stream", "--format", "{{.MemUsage}}", container.name).stdout.decode().strip()
    with capsys.disabled():
        print(f"\nimage: {size / 1e6:.0f} MB, ready after {container.ready_after:.1f} s, idle with {used} of memory")
    assert size < 2e9, "did CUDA come with torch?"


def test_it_has_no_rights(container: Container) -> None:
    """Neither root, nor capabilities, nor a file system to write to, nor a network; and an init that reaps."""
    status = dict(
        line.split(":\t", 1) for line in container.python("print(open('/proc/1/status').read())").splitlines() if ":\t" in line
    )
    assert status["Name"] == "tini"
    assert status["Uid"].split() == status["Gid"].split() == ["10001"] * 4
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    for path in ("/srv/caption/model_store/x", "/opt/venv/x", "/x", "/usr/local/bin/x"):
        refused = podman("exec", container.name, "touch", path, check=False)
        assert refused.returncode != 0, path
    assert container.python("import os; print(*os.listdir('/sys/class/net'))").split() == ["lo"]


def test_it_has_only_what_serving_needs(container: Container) -> None:
    found = container.python("""
import importlib.util, shutil
print([m for m in ("pytest", "matplotlib", "pycocotools", "h5py", "ray", "mypy") if importlib.util.find_spec(m)])
print([p for p in ("gcc", "cc", "make", "git", "curl", "javac") if shutil.which(p)])
""")
    assert found.split() == ["[]", "[]"]


def test_java_has_its_classes_from_the_archive(container: Container) -> None:
    """It says nothing of an archive that it does not take, such as one of other jars."""
    found = podman("exec", container.name, "sh", "-c", "grep -l frontend.jsa /proc/[0-9]*/maps 2>/dev/null; true").stdout
    assert found.strip()


def test_only_the_inference_port_is_open(container: Container) -> None:
    """Management could replace the model: it listens on the container's loopback alone, as do metrics and gRPC."""
    listening = container.python("""
import psutil
for c in psutil.net_connections("tcp"):
    if c.status == psutil.CONN_LISTEN and not c.laddr.ip.endswith("127.0.0.1"):
        print(c.laddr.port)
""")
    assert listening.split() == ["8080"]


def test_a_photo_is_captioned(container: Container) -> None:
    status, body = container.request("/predictions/caption")
    assert status == 200
    assert len(body["captions"]) == 5
    assert body["image"] == {"width": 451, "height": 300, "format": "JPEG"}


def test_without_a_token_nothing_is_answered(container: Container) -> None:
    status, body = container.request("/predictions/caption", token=False)
    assert status in {400, 401}
    assert "captions" not in body
    done = podman("exec", container.name, "python", "-m", "scripts.models", "--key-file", "/dev/null", "list", check=False)
    assert b"--key-file" in done.stderr


def test_models_are_managed_from_inside(container: Container) -> None:
    listed = podman("exec", container.name, "python", "-m", "scripts.models", "list").stdout.decode()
    assert re.fullmatch(r"caption\t1\.0\tdefault\t[1-9] READY\t.*\n", listed), listed


def test_the_heaviest_images_stay_within_the_memory(container: Container, capsys: pytest.CaptureFixture[str]) -> None:
    """50 megapixels in formats that cannot be decoded at a smaller scale, several at once."""
    photo = Image.open(io.BytesIO(CAT)).resize((9000, 5500))
    files = []
    for kind, options in (("WEBP", {"quality": 30, "method": 0}), ("PNG", {"compress_level": 1})):
        buffer = io.BytesIO()
        photo.quantize(64).convert("RGB").save(buffer, kind, **options)
        assert buffer.tell() < 20 * 2**20, f"{kind} would be refused before it is decoded"
        files += [buffer.getvalue()] * 3
    with concurrent.futures.ThreadPoolExecutor(len(files)) as pool:
        answers = list(pool.map(lambda file: container.request("/predictions/caption", file), files))
    # 413 where this machine needs longer than a request may take.
    assert {status for status, _ in answers} <= {200, 413}, answers
    assert not container.inspect()["State"]["OOMKilled"]
    peak = container.python("""
from pathlib import Path
files = [Path("/sys/fs/cgroup", name) for name in ("memory.peak", "memory/memory.max_usage_in_bytes")]
print(next((int(file.read_text()) // 2**20 for file in files if file.exists()), "unknown"))
""")
    with capsys.disabled():
        print(f"\nmemory at most, with images of 50 megapixels: {peak.strip()} MiB of {MEMORY}")
    assert container.request("/predictions/caption")[0] == 200


def test_it_is_unhealthy_while_it_has_no_worker(container: Container) -> None:
    """TorchServe's own /ping says Healthy all the time."""

    def healthy() -> bool:
        return podman("healthcheck", "run", container.name, check=False).returncode == 0

    def wait_until(wanted: bool) -> None:
        deadline = time.monotonic() + 90
        while healthy() is not wanted:
            assert time.monotonic() < deadline, logs(container.name)

    described = json.loads(podman("exec", container.name, "python", "-m", "scripts.models", "describe", "caption").stdout)
    killed = described["workers"][0]["pid"]
    container.python("import os, sys; os.kill(int(sys.argv[1]), 9)", killed)
    wait_until(False)
    wait_until(True)
    assert container.request("/predictions/caption")[0] == 200


EDGE_CLIENT = """
import json, sys, requests
from scripts.authorization import bearer
edge, photo = "http://127.0.0.1:8090", sys.stdin.buffer.read()
answers = [requests.get(edge + path, timeout=10) for path in ("/", "/app.js", "/docs", "/samples/cat.jpg", "/models")]
for headers in ({}, bearer("inference")):
    answers.append(requests.post(edge + "/predict", files={"image": photo}, headers=headers, timeout=60))
print(json.dumps([[a.status_code, a.headers["content-type"], a.text[:5000]] for a in answers]))
"""
"""Sends its standard input, and prints status, type and body of each answer."""


def test_the_edge_in_front_of_it(container: Container, edge_image: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Both images side by side as in a pod, the edge with what the manifests give it: the page, and captions through it."""
    name = f"{container.name}-edge"
    podman(
        *("run", "--detach", "--name", name, "--network", f"container:{container.name}", "--memory", "256m"),
        *("--tmpfs", "/tmp:rw,mode=1777,size=64m"),
        *RESTRICTED,
        edge_image,
    )
    try:
        deadline = time.monotonic() + 60
        while podman("healthcheck", "run", name, check=False).returncode != 0:
            assert time.monotonic() < deadline, logs(name)
            time.sleep(0.5)
        page, script, docs, sample, models, refused, captioned = json.loads(container.python(EDGE_CLIENT, data=CAT))
        assert (page[0], page[1]) == (200, "text/html; charset=utf-8")
        assert "<title>" in page[2]
        assert [answer[0] for answer in (script, docs, sample)] == [200, 200, 200]
        assert (models[0], json.loads(models[2])["error"]["code"]) == (404, "NotFound")
        assert refused[0] in {400, 401}
        assert "captions" not in refused[2]
        assert captioned[0] == 200
        assert len(json.loads(captioned[2])["captions"]) == 5
        status = podman("exec", name, "cat", "/proc/1/status").stdout.decode()
        assert re.search(r"^Uid:\t10001\t10001\t10001\t10001$", status, re.MULTILINE)
        assert re.search(r"^CapBnd:\t0+$", status, re.MULTILINE)
        assert podman("exec", name, "touch", "/srv/edge/web/x", check=False).returncode != 0
        size = int(podman("image", "inspect", "--format", "{{.Size}}", edge_image).stdout)
        used = podman("stats", "--no-stream", "--format", "{{.MemUsage}}", name).stdout.decode().strip()
        with capsys.disabled():
            print(f"\nedge: {size / 1e6:.0f} MB, {used} of memory")
        podman("kill", "--signal", "TERM", name)
        podman("wait", name)
        (found,) = json.loads(podman("inspect", name).stdout)
        assert found["State"]["ExitCode"] == 0, logs(name)
    finally:
        podman("rm", "--force", "--time", "0", name)


def test_the_other_model_is_served_and_sagemaker_understands_it(image: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A .mar that is mounted to /opt/ml/model replaces the embedded one; `/ping` and `/invocations` on port 8080."""
    parts = {"vocabulary": checkpoint.vocabulary, "encoder": checkpoint.encoder, "decoder": checkpoint.decoder}
    config = checkpoint.config.model_copy(update={"version": "7.0"})
    save_checkpoint(tmp_path / "checkpoint", config=config, **parts)  # type: ignore[arg-type]
    model_config = ROOT / "deploy/torchserve/model-config.yaml"
    package(tmp_path / "checkpoint", tmp_path / "model/photos.mar", name="photos", model_config=model_config)
    (tmp_path / "model/photos.mar").chmod(0o644)
    for folder in (tmp_path.parent, tmp_path, tmp_path / "model"):
        folder.chmod(0o755)
    options = ("--volume", f"{tmp_path}/model:/opt/ml/model:ro", "--env", "TS_DISABLE_TOKEN_AUTHORIZATION=true")
    for container in run(image, *options):
        ping = container.python("import requests; print(requests.get('http://127.0.0.1:8080/ping', timeout=2).status_code)")
        assert ping.strip() == "200"
        status, body = container.request("/invocations?beam_size=2", token=False)
        assert status == 200
        assert (body["model"]["name"], body["model"]["version"]) == ("caption", "7.0")
        assert len(body["captions"]) <= 2
        # Where a platform knows no probe by command: with this header a worker answers, and only one that is ready can.
        described = container.python(
            "import requests\n"
            "answer = requests.get('http://127.0.0.1:8080/predictions/caption', headers={'describe': 'True'}, timeout=5)\n"
            "print(answer.status_code, answer.json()['version'])"
        )
        assert described.split() == ["200", "7.0"]


def test_sigterm_ends_it_in_time_and_loses_no_request(container: Container) -> None:
    """The last test of this container. Docker kills ten seconds after SIGTERM."""
    requests_at_once = 10  # two batches: what a busy machine, too, can do in DRAIN_SECONDS
    command = ["bash", "-c", '. "$0/environment" && exec podman --runtime runc "$@"', str(STORAGE)]
    client = subprocess.Popen(
        [*command, "exec", "--interactive", container.name, "python", "-c", BUSY_CLIENT, str(requests_at_once)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write(CAT)
    client.stdin.close()
    answers = [client.stdout.readline().split()]  # the first is answered: the others are being worked on
    signalled = time.time()
    podman("kill", "--signal", "TERM", container.name)
    podman("wait", container.name)
    ended = time.time()
    answers += [line.split() for line in client.stdout]
    client.stdout.close()
    client.wait()
    assert [status for status, _ in answers] == [b"200"] * requests_at_once
    assert max(float(when) for _, when in answers) > signalled, "nothing was in flight: the test shows nothing"
    assert ended - signalled < 10
    assert "stopping when the requests in flight are answered" in logs(container.name)
