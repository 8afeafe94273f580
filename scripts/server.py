"""Run TorchServe with this project's configuration until a signal ends it: `python -m scripts.server --help`.

Set-up is done by `scripts/serve`, which ends here; the container starts here. Everything that TorchServe starts is in one
process group and in one temporary directory, so that neither a process nor a file stays behind.

TorchServe can become a zombie: it stops restarting workers that keep dying, and then takes requests that it never answers.
So this process captions an image from time to time. When that has not worked for a while it ends, with a message and a
status other than 0, so that whatever runs it (Docker, Kubernetes, systemd) starts it anew.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

import psutil

from handler.machine import available_cpus
from scripts.authorization import KEY_FILE
from scripts.probe import POLL_SECONDS, no_answer, not_ready, switched_off, work_done
from scripts.serving import plan

if TYPE_CHECKING:
    from scripts.edge import Edge

ROOT = Path(__file__).resolve().parent.parent
STOP_SECONDS = 20
DRAIN_SECONDS = 6.0
"""How long requests in flight may take to finish when the service is told to stop. With the end of the processes it is
less than the ten seconds after which Docker kills."""
QUIET_SECONDS = 0.75
STALL_SECONDS = 120.0
"""How long nothing may be captioned before the service ends itself. TorchServe ends a worker that hangs after
`responseTimeout` (60 s) and starts another one, which must have time to load."""
CANARY_SECONDS = 15.0
CONFIG = ROOT / "config.properties"
TORCHSERVE = Path(str(importlib.util.find_spec("ts").origin)).parent  # type: ignore[union-attr]
CLASS_PATH = (ROOT / "deploy/torchserve/frontend.jar", TORCHSERVE / "frontend/model-server.jar")
"""Where a class is in both jars, the first one's is taken: this is how ours replaces one of TorchServe's."""
CLASS_ARCHIVE = Path(sys.prefix) / "frontend.jsa"
"""What `scripts.class_archive` has written, if it has."""
ADDRESSES = {"inference": "inference_address", "management": "management_address", "metrics": "metrics_address"}
GRPC_PORTS = {"gRPC inference": 7070, "gRPC management": 7071}


class ServerError(Exception):
    """The server cannot start, or ended by itself. The message says what to do."""


class TorchServe:
    """One TorchServe process with its workers; a context manager that starts it and stops it whole.

    settings: config.properties keys that differ from the file, such as `inference_address`.
    """

    def __init__(
        self,
        settings: Mapping[str, str] | None = None,
        *,
        config: Path = CONFIG,
        model: str = "caption",
        java_options: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.java_options = list(java_options)
        self.config = config
        self.settings = dict(settings or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    def __enter__(self) -> TorchServe:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def address(self, name: str) -> str:
        """URL of the `inference`, `management` or `metrics` API."""
        return self._setting(ADDRESSES[name])

    @property
    def key_file(self) -> Path | None:
        """Where TorchServe writes its keys when token authorization is on."""
        return None if self._folder is None else self._folder / "key_file.json"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process and return at once. Raises ServerError when a port is taken or a file is missing."""
        self._check()
        self._folder = Path(tempfile.mkdtemp(prefix="torchserve-"))
        environment = plan().environment() | os.environ | {f"TS_{key.upper()}": value for key, value in self.settings.items()}
        # The frontend only passes bytes on: Java's thorough compiler takes twice the time that it saves. A small space for new
        # objects is soon one that is in memory and in the cache.
        environment.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1 -Xmn16m")
        # TorchServe keeps its process number, unpacked models and sockets in the temporary directory; this one is ours
        # alone, so that several servers live side by side and nothing is left when one ends.
        environment |= {"TMPDIR": str(self._folder), "TEMP": str(self._folder), "LOG_LOCATION": str(self._folder)}
        environment.pop("PYTHONPATH", None)  # it would win over the code in the .mar
        # Its workers would parse JSON of any shape and size before the handler can refuse it.
        environment["TS_DECODE_INPUT_REQUEST"] = "false"
        # It writes its keys to where it is started, which must be private and writable, so paths are given in full.
        environment |= {f"TS_{key.upper()}": str(ROOT / self._setting(key)) for key in ("model_store", "metrics_config")}
        command = self._command(self._folder, environment["TS_MODEL_STORE"])
        # A group of its own: Ctrl-C in the terminal reaches this process only, which then stops TorchServe in order.
        self._process = subprocess.Popen(command, cwd=self._folder, env=environment, start_new_session=True)
        if os.environ.get(KEY_FILE):
            link = Path(os.environ[KEY_FILE])
            link.unlink(missing_ok=True)
            link.symlink_to(self._folder / "key_file.json")

    def _command(self, folder: Path, model_store: str) -> list[str]:
        """What `torchserve --start` would run, with our jar before TorchServe's."""
        options = [*self.java_options, *shlex.split(self._setting("vmargs", ""))]
        if CLASS_ARCHIVE.is_file() and not self.java_options:
            options.append(f"-XX:SharedArchiveFile={CLASS_ARCHIVE}")
        plugins = self._setting("plugins_path", "")
        return [
            _java(),
            f"-Dmodel_server_home={TORCHSERVE.parent}",
            f"-Dlog4j.configurationFile=file://{ROOT / 'deploy/torchserve/log4j2.xml'}",
            f"-Djava.io.tmpdir={folder}",
            # With fewer threads in this pool, as on two CPUs, Java starts a new one for each batch.
            f"-Djava.util.concurrent.ForkJoinPool.common.parallelism={max(2, available_cpus() - 1)}",
            *options,
            *("-cp", ":".join([*map(str, CLASS_PATH), *([f"{plugins}/*"] if plugins else [])])),
            *("org.pytorch.serve.ModelServer", "--python", sys.executable),
            *("-f", str(self.config), "-s", model_store, "-ncs"),
        ]

    def wait_until_ready(self, timeout: float = 180.0) -> None:
        """Return when every worker is READY. Raises ServerError when the time is over or TorchServe has ended."""
        deadline = time.monotonic() + timeout
        while (reason := not_ready(self.address("management"), self.model, key_file=self.key_file)) is not None:
            self.check_alive()
            if time.monotonic() > deadline:
                raise ServerError(f"not ready after {timeout:.0f} seconds: {reason}")
            time.sleep(POLL_SECONDS)

    def check_alive(self) -> None:
        """Raises ServerError when TorchServe has ended."""
        status = None if self._process is None else self._process.poll()
        if status is not None:
            raise ServerError(f"TorchServe has ended with status {status}; the reason stands above")

    def drain(self, seconds: float = DRAIN_SECONDS) -> None:
        """Wait until the requests in flight are answered, `seconds` at most.

        TorchServe itself drops them when it ends, and cannot be told to take no new ones: that is for whoever sends them,
        a load balancer say, which takes the service out of its list first. None is in flight when no client is connected,
        or when for a while no worker did anything for those that are.
        """
        if self._process is None or self._process.poll() is not None:
            return
        frontend = psutil.Process(self._process.pid)
        port = int(self.address("inference").rpartition(":")[2].strip("/"))
        deadline = time.monotonic() + seconds
        busy, used = time.monotonic(), _cpu_seconds(frontend)
        while time.monotonic() < deadline and _is_connected(frontend, port):
            time.sleep(0.05)
            before, used = used, _cpu_seconds(frontend)
            if used != before:
                busy = time.monotonic()
            elif time.monotonic() - busy > QUIET_SECONDS:
                break

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """End TorchServe and its workers: politely, then after `seconds` by force. Safe to call twice."""
        if self._process is not None:
            children = _group(self._process.pid)
            _signal(children, signal.SIGTERM)
            _, left = psutil.wait_procs(children, timeout=seconds)
            _signal(left, signal.SIGKILL)
            self._process.wait()
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _setting(self, key: str, default: str | None = None) -> str:
        if key in self.settings:
            return self.settings[key]
        if f"TS_{key.upper()}" in os.environ:
            return os.environ[f"TS_{key.upper()}"]
        lines = (line.partition("=") for line in self.config.read_text().splitlines() if not line.startswith("#"))
        found = {name.strip(): value.strip() for name, _, value in lines}
        return found[key] if default is None else found.get(key, default)

    def _check(self) -> None:
        if shutil.which(_java()) is None:
            raise ServerError(
                f"{_java()} is missing: install Java 17, on Debian and Ubuntu `apt-get install openjdk-17-jre-headless`"
            )
        addresses = {name: self.address(name).rpartition(":")[2] for name in ADDRESSES}
        ports = {name: int(port.strip("/")) for name, port in addresses.items()}
        ports |= {
            name: int(self.settings.get(name.replace("gRPC ", "grpc_") + "_port", port)) for name, port in GRPC_PORTS.items()
        }
        for name, port in ports.items():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError as error:
                    raise ServerError(
                        f"port {port} ({name}) cannot be used: {error.strerror}. Stop what uses it, or choose another"
                    ) from None


class Watchdog:
    """Captions an image from time to time, and notices when that has not worked for `seconds`."""

    def __init__(self, server: TorchServe, seconds: float = STALL_SECONDS) -> None:
        self.server = server
        self.seconds = seconds
        self._alive = self._next = time.monotonic()
        self._work_done: float | None = None

    def look(self) -> None:
        """Return at once or after a canary, which may take ten seconds. Raises ServerError when the service is stalled."""
        if time.monotonic() < self._next:
            return
        inference, management, metrics = (self.server.address(name) for name in ADDRESSES)
        model, keys = self.server.model, self.server.key_file
        status, reason = no_answer(inference, model, timeout=min(10.0, self.seconds / 2), key_file=keys)
        before = self._work_done
        if reason is not None:
            self._work_done = work_done(metrics)
        # A refusal (keys that have run out, say) shows nothing wrong. When all is busy, others' images are the sign of life.
        busy = reason is not None and before is not None and self._work_done is not None and self._work_done > before
        if reason is None or 400 <= status < 500 or busy or switched_off(management, model, key_file=keys):
            self._alive = time.monotonic()
        quiet = time.monotonic() - self._alive
        if quiet > self.seconds:
            reason = not_ready(management, model, key_file=keys) or reason
            raise ServerError(
                f"nothing has been captioned for {quiet:.0f} seconds: {reason}. "
                "Ending, so that whoever runs this service starts it anew"
            )
        self._next = time.monotonic() + (min(CANARY_SECONDS, self.seconds / 4) if reason is None else 1.0)


def _java() -> str:
    home = os.environ.get("JAVA_HOME")
    return f"{home}/bin/java" if home else "java"


def free_settings() -> dict[str, str]:
    """Settings for a second server on this machine: free ports everywhere."""
    names = ["inference", "management", "metrics", "grpc_inference", "grpc_management", "worker"]
    sockets = [socket.socket() for _ in names]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        port = {name: one.getsockname()[1] for name, one in zip(names, sockets, strict=True)}
    finally:
        for one in sockets:
            one.close()
    return {
        **{key: f"http://127.0.0.1:{port[name]}" for name, key in ADDRESSES.items()},
        "grpc_inference_port": str(port["grpc_inference"]),
        "grpc_management_port": str(port["grpc_management"]),
        "initial_worker_port": str(port["worker"]),
    }


def _is_connected(frontend: psutil.Process, port: int) -> bool:
    try:
        connections = frontend.net_connections("tcp")
    except psutil.Error:
        return False
    return any(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port for c in connections)


def _cpu_seconds(frontend: psutil.Process) -> float:
    """What the workers, and the processes that they started, have used. An idle worker uses nothing at all."""
    total = 0.0
    for process in frontend.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _group(leader: int) -> list[psutil.Process]:
    """The processes of a session, workers that lost their parent included."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader:
                members.append(process)
        except OSError:
            continue
    return members


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _started_edge(inference: str, model: str) -> Edge:
    """The web page's server in front of TorchServe. Raises ServerError."""
    from scripts.edge import Edge, EdgeError  # the container has neither it nor nginx

    edge = Edge({"EDGE_UPSTREAM": inference.rpartition("/")[2], "EDGE_MODEL": model})
    try:
        edge.start()
    except EdgeError as error:
        raise ServerError(str(error)) from None
    return edge


def _say(text: str, file: TextIO | None = None) -> None:
    """Print, unless the disk under the log is full, which is no reason to end."""
    with contextlib.suppress(OSError):
        print(text, file=file, flush=True)


class _Stopped(Exception):
    """SIGTERM or SIGINT has come."""


def _stop(number: int, _frame: FrameType | None) -> None:
    for ignored in (signal.SIGTERM, signal.SIGINT):  # one is enough; a second must not interrupt the stopping
        signal.signal(ignored, signal.SIG_IGN)
    raise _Stopped


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--model", default="caption", help="the model whose workers must be ready")
    parser.add_argument("--web", action="store_true", help="start the edge with the web page as well; see docs/edge.md")
    parser.add_argument(
        "--stall",
        type=float,
        default=float(os.environ.get("CAPTION_STALL_SECONDS", STALL_SECONDS)),
        metavar="SECONDS",
        help="end when nothing could be captioned for so long; 0: never",
    )
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    server = TorchServe(config=arguments.config, model=arguments.model)
    edge: Edge | None = None
    try:
        began = time.monotonic()
        server.start()
        server.wait_until_ready()
        inference = server.address("inference")
        if arguments.web:
            edge = _started_edge(inference, arguments.model)
        _say(
            f"ready after {time.monotonic() - began:.1f} s: {inference}\n"
            f"try   curl -F image=@samples/cat.jpg {inference}/predictions/{arguments.model}\n"
            + (f"web   {edge.url}\n" if edge else "")
            + "stop  Ctrl-C"
        )
        watchdog = Watchdog(server, arguments.stall) if arguments.stall > 0 else None
        while True:
            server.check_alive()
            if edge and not edge.is_alive():
                raise ServerError("nginx has ended; the reason stands above")
            if watchdog is not None:
                watchdog.look()
            time.sleep(1)
    except _Stopped:
        _say("stopping when the requests in flight are answered")
        if edge:
            edge.stop()
        server.drain(float(os.environ.get("CAPTION_DRAIN_SECONDS", DRAIN_SECONDS)))
    except ServerError as error:
        _say(f"error: {error}", sys.stderr)
        server.stop(seconds=5)  # what hangs does not end politely
        sys.exit(1)
    finally:
        if edge:
            edge.stop()
        server.stop()


if __name__ == "__main__":
    main()
