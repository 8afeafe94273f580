"""Run the edge, nginx with the web page in front of TorchServe: `python -m scripts.edge --help`.

`scripts/serve --web` starts it beside TorchServe; alone it serves one that runs elsewhere. Its settings are environment
variables, named with their defaults in deploy/nginx/edge.env and explained in docs/edge.md. Needs Python's standard library
and nginx alone.
"""

from __future__ import annotations

import argparse
import grp
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "deploy/nginx"
START_SECONDS = 15
STOP_SECONDS = 12
"""More than nginx's own `worker_shutdown_timeout`."""
SWAGGER_UI_FILES = ("swagger-ui.css", "swagger-ui-bundle.js")
_VARIABLE = re.compile(r"\$\{(EDGE_[A-Z_]+)\}")


class EdgeError(Exception):
    """nginx cannot start, or ended by itself. The message says what to do."""


class Edge:
    """One nginx with its workers; a context manager that starts it and stops it whole.

    Everything it needs and makes is in one temporary directory, so that any user can run it and nothing is left.

    settings: variables of edge.env that differ from the environment and the file, such as `EDGE_LISTEN`.
    """

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        defaults = _read_env(TEMPLATES / "edge.env")
        given = {name: value for name, value in os.environ.items() if name.startswith("EDGE_")}
        self.settings = {**defaults, **given, **(settings or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    def __enter__(self) -> Edge:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where this machine reaches the edge."""
        host, _, port = self.settings["EDGE_LISTEN"].split()[0].rpartition(":")
        return f"http://{'127.0.0.1' if host in ('', '0.0.0.0', '*', '[::]') else host}:{port}"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start nginx and return when it answers. Raises EdgeError when it cannot, after its own words on stderr."""
        nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
        if nginx is None:
            raise EdgeError("nginx is missing: install it, on Debian and Ubuntu `apt-get install nginx`")
        self._folder = Path(tempfile.mkdtemp(prefix="edge-"))
        try:
            self._check_port()
            self._lay_out(self._folder)
            command = [nginx, "-e", "stderr", "-p", str(self._folder), "-c", str(self._folder / "nginx.conf")]
            # A session of its own: Ctrl-C in the terminal reaches this process only, which then stops nginx in order.
            self._process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End nginx: when the requests in flight are answered, or after a while by force. Safe to call twice."""
        if self._process is not None:
            for number in (signal.SIGQUIT, signal.SIGTERM, signal.SIGKILL):
                self._process.send_signal(number)
                try:
                    self._process.wait(STOP_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    continue
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _lay_out(self, folder: Path) -> None:
        """Write the configuration, and copy what nginx serves to where its workers can read it whoever they are."""
        is_root = os.geteuid() == 0
        if is_root:
            folder.chmod(0o711)  # nginx's workers are another user then
        web = folder / "web"
        shutil.copytree(ROOT / "web", web)
        shutil.copytree(ROOT / "samples", web / "samples", ignore=shutil.ignore_patterns("*.md"))
        swagger_ui = web / "docs/swagger-ui"
        swagger_ui.mkdir()
        source = Path(self.settings.get("EDGE_SWAGGER_UI") or swagger_ui_directory())
        for name in SWAGGER_UI_FILES:
            shutil.copyfile(source / name, swagger_ui / name)
        for path in (web, *web.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        (folder / "tmp").mkdir()
        (folder / "tmp").chmod(0o711 if is_root else 0o700)
        values = {
            **self.settings,
            "EDGE_RUN": str(folder),
            "EDGE_INCLUDE": str(folder),
            "EDGE_SOCKET": str(folder / "inside.sock"),
            "EDGE_WEB": str(web),
            "EDGE_USER": f"user {_unprivileged_user()};" if is_root else "",
        }
        for name in ("nginx.conf", "caption.conf", *(["tls.conf"] if self.settings["EDGE_TLS_CERTIFICATE"] else [])):
            (folder / name).write_text(_filled((TEMPLATES / f"{name}.template").read_text(), values))
            (folder / name).chmod(0o600)

    def _check_port(self) -> None:
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host.strip("[]"), int(port)))
            except OSError as error:
                raise EdgeError(
                    f"port {port} (edge) cannot be used: {error.strerror}. Stop what uses it, or set EDGE_LISTEN"
                ) from None

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if not self.is_alive():
                raise EdgeError("nginx has ended; the reason stands above")
            try:
                urllib.request.urlopen(self.url, timeout=2).close()
                return
            except urllib.error.HTTPError as error:
                error.close()
                raise EdgeError(
                    f"nginx cannot read the page (status {error.code}). Started by root, its workers are another user: set "
                    "TMPDIR to a directory that every user can reach, such as /tmp"
                ) from None
            except OSError as error:
                if time.monotonic() > deadline:
                    raise EdgeError(f"nginx does not answer at {self.url}: {error}") from None
                time.sleep(0.05)


def swagger_ui_directory() -> Path:
    """Where the package with Swagger UI's files has them. Raises EdgeError when it is not installed."""
    package = importlib.util.find_spec("flask_swagger_ui")  # found, not imported: Flask is not needed
    if package is None or package.origin is None:
        raise EdgeError("Swagger UI is missing: run `scripts/setup web`")
    return Path(package.origin).parent / "dist"


def _unprivileged_user() -> str:
    """User and group of nginx's workers when it is started by root."""
    known = {user.pw_name: user for user in pwd.getpwall()}
    user = next(known[name] for name in ("www-data", "nginx", "nobody") if name in known)
    return f"{user.pw_name} {grp.getgrgid(user.pw_gid).gr_name}"


def _filled(template: str, values: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: values[match[1]], template)


def _read_env(path: Path) -> dict[str, str]:
    lines = (line.partition("=") for line in path.read_text().splitlines() if line and not line.startswith("#"))
    return {name: value for name, _, value in lines}


class _Stopped(Exception):
    """SIGTERM or SIGINT has come."""


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise _Stopped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.RawTextHelpFormatter)
    parser.epilog = (TEMPLATES / "edge.env").read_text()
    parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    edge = Edge()
    try:
        edge.start()
        print(f"ready: {edge.url}, in front of {edge.settings['EDGE_UPSTREAM']}", flush=True)
        while edge.is_alive():
            time.sleep(1)
        sys.exit("error: nginx has ended; the reason stands above")
    except _Stopped:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    except EdgeError as error:
        sys.exit(f"error: {error}")
    finally:
        edge.stop()


if __name__ == "__main__":
    main()
