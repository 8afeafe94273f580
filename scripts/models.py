"""Manage the models of a running TorchServe: `python -m scripts.models --help`.

A client of the management API that waits until what was asked for is so, and says in one line what is. Docs: rolling
update, blue/green and canary of versions in docs/deploy/models.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import requests

from scripts.authorization import KEY_FILE, bearer
from scripts.probe import POLL_SECONDS

REQUEST_SECONDS = 30.0
"""For a request to the API that starts no worker."""


class ManagementError(Exception):
    """The API refuses, cannot be reached, or did not get there in time. The message says what to do."""


class Management:
    """The management API at `address`, such as `http://127.0.0.1:8081`. Every method raises ManagementError.

    timeout: seconds that workers may take to start.
    """

    def __init__(self, address: str, *, key_file: Path | None = None, timeout: float = 180.0) -> None:
        self.address = address.rstrip("/")
        self.key_file = key_file
        self.timeout = timeout

    def models(self) -> dict[str, list[dict[str, Any]]]:
        """All versions of all models, by the models' names, as `versions` gives them."""
        names: list[str] = []
        page: str | None = ""
        while page is not None:
            answer = self._call("GET", "/models", limit=100, next_page_token=page or None)
            names += [model["modelName"] for model in answer["models"]]
            page = answer.get("nextPageToken")
        return {name: self.versions(name) for name in dict.fromkeys(names)}

    def versions(self, name: str) -> list[dict[str, Any]]:
        """The versions of a model, each as TorchServe describes it: `modelVersion`, `workers`, `jobQueueStatus`, …"""
        found: list[dict[str, Any]] = self._call("GET", f"/models/{name}/all")
        return found

    def version(self, name: str, version: str | None = None, *, customized: bool = False) -> dict[str, Any]:
        """One version, the default one if none is named; `customized` asks a worker of it to describe the model, too."""
        path = f"/models/{name}" + (f"/{version}" if version else "")
        (found,) = self._call("GET", path, customized="true" if customized else None)
        return dict(found)

    def default(self, name: str) -> str:
        """The version that answers requests which name none."""
        return str(self.version(name)["modelVersion"])

    def scale(self, name: str, workers: int, version: str | None = None) -> dict[str, Any]:
        """Give a version so many workers, and wait until they are READY. Gives the version's description.

        A worker that goes passes what it has in hand on to the others. The last one cannot: that is answered with status 503.
        """
        path = f"/models/{name}" + (f"/{version}" if version else "")
        try:  # to wait for it tells when a worker ends instead; TorchServe would go on to start it again and again
            self._call("PUT", path, min_worker=workers, max_worker=workers, synchronous="true")
        except ManagementError as error:
            if "Failed to start workers" not in str(error):
                raise
            raise ManagementError(
                "a worker ended while it loaded the model. The server's log has the reason, in the lines before "
                '"Load model failed"; most likely the archive is damaged or made for another version: pack it anew'
            ) from None
        return self._wait_for_workers(name, version, workers)

    def register(self, archive: str, name: str, *, workers: int = 1) -> dict[str, Any]:
        """Add the version in `archive`, a file name in the server's model store, beside the others of the model.

        The version gets requests by its number only, until `set_default`; a model's first version is its default at once.
        A version that does not become ready is taken out again, by TorchServe or by this. A server that is not meant to be
        changed refuses it: `enable_model_api` in its configuration.
        """
        before = {v["modelVersion"] for v in self.models().get(name, [])}
        self._call("POST", "/models", url=archive, model_name=name, initial_workers=0)
        added = [v["modelVersion"] for v in self.versions(name) if v["modelVersion"] not in before]
        if len(added) != 1:  # somebody else does the same
            raise ManagementError(f"{archive} is registered, but as which version is unclear: new are {added}")
        try:
            return self.scale(name, workers, added[0])
        except ManagementError as error:
            self._call("DELETE", f"/models/{name}/{added[0]}")
            raise ManagementError(f"{archive} cannot be served, and is taken out again: {error}") from None

    def set_default(self, name: str, version: str) -> None:
        """Send the requests that name no version to this one from now on. Refused while it has no worker that is READY."""
        states = Counter(worker["status"] for worker in self.version(name, version)["workers"])
        if not states["READY"]:
            raise ManagementError(
                f"version {version} of {name} has no worker that is ready: `scale {name} 1 --version {version}` gives it one"
            )
        self._call("PUT", f"/models/{name}/{version}/set-default")

    def unregister(self, name: str, version: str | None = None, *, settle: float | None = None) -> None:
        """Take a version, or all of a model, out of service, after its queue is empty and what it works on is answered.

        settle: seconds between the empty queue and the end. TorchServe does not tell what its workers work on; by default
        it is the version's response timeout, after which nothing can be left.
        """
        default, others = self.default(name), len(self.versions(name)) > 1
        doomed = [self.version(name, version)] if version else self.versions(name)
        if version == default and others:
            raise ManagementError(f"{version} is the default version of {name}: make another one that, with `set-default`")
        if any(v["workers"] for v in doomed):
            deadline = time.monotonic() + self.timeout
            while any(v.get("jobQueueStatus", {}).get("pendingRequests") for v in doomed):
                if time.monotonic() > deadline:
                    raise ManagementError(f"{name} still has requests waiting: is it in use?")
                time.sleep(POLL_SECONDS)
                doomed = [self.version(name, v["modelVersion"]) for v in doomed]
            time.sleep(max(v.get("responseTimeout", 120) for v in doomed) if settle is None else settle)
        # The default version goes last: as long as there are others, TorchServe does not let it go.
        for one in sorted(doomed, key=lambda v: bool(v["modelVersion"] == default)):
            self._call("DELETE", f"/models/{name}/{one['modelVersion']}")

    def _wait_for_workers(self, name: str, version: str | None, wanted: int) -> dict[str, Any]:
        deadline = time.monotonic() + self.timeout
        while True:
            described = self.version(name, version)
            states = [worker["status"] for worker in described["workers"]]
            if states == ["READY"] * wanted:
                return described
            if time.monotonic() > deadline:
                raise ManagementError(
                    f"after {self.timeout:.0f} s {name} has {_counted(states)} instead of {wanted} READY: see its log"
                )
            time.sleep(POLL_SECONDS)

    def _call(self, method: str, path: str, **parameters: Any) -> Any:
        try:
            response = requests.request(
                method,
                self.address + path,
                params={k: v for k, v in parameters.items() if v is not None},
                headers=bearer("management", self.key_file),
                timeout=REQUEST_SECONDS + (self.timeout if method in {"PUT", "POST"} else 0),
            )
        except requests.ConnectionError:
            raise ManagementError(
                f"nothing answers at {self.address}: is the server running, and is this its management address?"
            ) from None
        except requests.Timeout as error:
            raise ManagementError(f"{self.address} takes too long ({error}): see `list`, and the server's log") from None
        except requests.RequestException as error:
            raise ManagementError(f"{self.address}: {error}") from None
        try:
            answer = response.json()
        except ValueError:
            raise ManagementError(f"{self.address} is no TorchServe: it answers with status {response.status_code}") from None
        if response.ok:
            return answer
        if response.status_code == 405:
            raise ManagementError("this server does not let models be changed: start it with TS_ENABLE_MODEL_API=true")
        if answer.get("type") == "InvalidKeyException":
            raise ManagementError(
                f"the server wants a token: name the key file it wrote when it started, with --key-file or {KEY_FILE}"
            )
        raise ManagementError(f"{answer.get('message', answer)} (status {response.status_code})")


def _counted(states: list[str]) -> str:
    """`2 READY, 1 WORKER_STARTED`"""
    return ", ".join(f"{number} {state}" for state, number in sorted(Counter(states).items())) or "no workers"


def _line(version: dict[str, Any], default: str) -> str:
    """A version in one line: model, version, whether it is the default, workers, queue, archive."""
    states = _counted([worker["status"] for worker in version["workers"]])
    queue = version.get("jobQueueStatus", {}).get("pendingRequests", 0)
    role = "default" if version["modelVersion"] == default else "-"
    return f"{version['modelName']}\t{version['modelVersion']}\t{role}\t{states}\t{queue} waiting\t{version['modelUrl']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--management", default=os.environ.get("TS_MANAGEMENT_ADDRESS", "http://127.0.0.1:8081"), metavar="URL")
    parser.add_argument("--key-file", type=Path, help=f"key_file.json of a server with tokens; default: what {KEY_FILE} names")
    parser.add_argument("--timeout", type=float, default=180, help="seconds that workers may take to start; default: 180")
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("list", help="all models and versions, their workers and queues")
    describe = commands.add_parser("describe", help="all that is known of a model, as JSON")
    scale = commands.add_parser("scale", help="set the number of workers, and wait until they are ready")
    register = commands.add_parser("register", help="add a model or a new version, and wait until it is ready")
    set_default = commands.add_parser("set-default", help="send requests that name no version to this one")
    unregister = commands.add_parser("unregister", help="take a version out when it has answered what it was asked")

    for command in (describe, scale, set_default, unregister):
        command.add_argument("model")
    scale.add_argument("workers", type=int)
    for command in (describe, scale):
        command.add_argument("--version", help="default: the default version")
    register.add_argument("archive", help="name of a .mar file in the server's model store")
    register.add_argument("--model", default="caption", help="default: caption")
    register.add_argument("--workers", type=int, default=1, help="default: 1")
    set_default.add_argument("version")
    unregister.add_argument("version", nargs="?", help="default: all versions")
    unregister.add_argument("--settle", type=float, metavar="SECONDS", help="default: the version's response timeout")

    arguments = parser.parse_args()
    if getattr(arguments, "workers", 0) < 0:
        parser.error("the number of workers cannot be negative")
    try:
        _run(Management(arguments.management, key_file=arguments.key_file, timeout=arguments.timeout), arguments)
    except ManagementError as error:
        sys.exit(f"error: {error}")


def _run(management: Management, arguments: argparse.Namespace) -> None:
    def show(version: dict[str, Any]) -> None:
        print(_line(version, management.default(version["modelName"])))

    match arguments.command:
        case "list":
            for versions in management.models().values():
                for version in versions:
                    show(version)
        case "describe":
            version = management.version(arguments.model, arguments.version, customized=True)
            print(json.dumps(version, indent=2, ensure_ascii=False))
        case "scale":
            show(management.scale(arguments.model, arguments.workers, arguments.version))
        case "register":
            show(management.register(arguments.archive, arguments.model, workers=arguments.workers))
        case "set-default":
            management.set_default(arguments.model, arguments.version)
            show(management.version(arguments.model))
        case "unregister":
            management.unregister(arguments.model, arguments.version, settle=arguments.settle)
            print(f"{arguments.model} {arguments.version or '(all versions)'} is out of service")


if __name__ == "__main__":
    main()
