"""What is wrong with a running service: `python -m scripts.doctor`. Looks only; changes nothing.

Prints a line for each thing that it looked at, with what to do where something is amiss, and exits with 1 when the service
cannot do its work. The machine's side (memory, file descriptors) is looked at where the service runs on this machine.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil
import requests

from scripts.authorization import bearer
from scripts.probe import no_answer, switched_off

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SLOW_CANARY_SECONDS = 2.0
LONG_QUEUE_SECONDS = 1.0
LITTLE_DISK, LITTLE_MEMORY = 500 * 2**20, 0.1


@dataclass(frozen=True)
class Finding:
    state: Literal["ok", "warning", "broken"]
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.state:8} {self.what}" + (f"\n         {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Addresses:
    inference: str
    management: str
    metrics: str
    model: str


def examine(service: Addresses) -> Iterator[Finding]:
    """Everything that can be seen of a service from outside, and from this machine if it runs here."""
    yield from _captions(service)
    versions = _versions(service)
    if isinstance(versions, Finding):
        yield versions
    else:
        yield from _workers(service, versions)
        yield from _machine(versions)
    yield from _counters(service)
    yield from _openness(service)


def _captions(service: Addresses) -> Iterator[Finding]:
    began = time.monotonic()
    status, reason = no_answer(service.inference, service.model)
    seconds = time.monotonic() - began
    if reason is None and seconds < SLOW_CANARY_SECONDS:
        yield Finding("ok", f"an image is captioned, in {seconds * 1e3:.0f} ms")
    elif reason is None:
        yield Finding(
            "warning",
            f"an image is captioned, but in {seconds:.1f} s",
            "it waited for others, or the machine is short of processors",
        )
    elif status == 503:
        yield Finding(
            "broken", reason, "all workers are busy and the queue is full, or there are none: add workers or replicas"
        )
    elif status in (400, 401, 403):
        yield Finding("warning", reason, "with token authorization on, name the key file in CAPTION_KEY_FILE")
    elif status == 404:
        yield Finding("broken", reason, f"no model is called {service.model}: see GET {service.management}/models")
    else:
        yield Finding("broken", reason, "the workers' states below and the service's log say more")


def _versions(service: Addresses) -> list[dict[str, Any]] | Finding:
    try:
        response = requests.get(f"{service.management}/models/{service.model}/all", headers=bearer("management"), timeout=5)
    except requests.RequestException as error:
        return Finding(
            "warning",
            f"the management API at {service.management} does not answer ({type(error).__name__})",
            "it is on the service's own machine alone, as a rule: run this there",
        )
    if response.status_code != 200:
        return Finding("warning", f"the management API answers {response.status_code} about model {service.model}")
    return response.json()


def _workers(service: Addresses, versions: list[dict[str, Any]]) -> Iterator[Finding]:
    for version in versions:
        name = f"version {version['modelVersion']}"
        states = [worker["status"] for worker in version["workers"]]
        ready = states.count("READY")
        if ready and ready == len(states):
            yield Finding("ok", f"{name}: {ready} of {ready} workers READY")
        elif ready:
            yield Finding(
                "warning", f"{name}: workers in the states {', '.join(states)}", "one starts, or was killed: look again"
            )
        elif switched_off(service.management, service.model):
            yield Finding("broken", f"{name} has no workers, as somebody wanted", "scale it up: min_worker=1")
        else:
            yield Finding(
                "broken",
                f"{name}: no worker is READY ({', '.join(states) or 'there are none'})",
                "the log says why they end; not enough memory and a damaged archive are the usual reasons",
            )
        if version["workers"] and version["maxWorkers"] > (psutil.cpu_count() or 1) and not version["workers"][0]["gpu"]:
            yield Finding(
                "warning", f"{name} may have {version['maxWorkers']} workers", "more than processors make each slower"
            )


def _machine(versions: list[dict[str, Any]]) -> Iterator[Finding]:
    processes = []
    for version in versions:
        for worker in version["workers"]:
            with suppress(psutil.Error):
                processes.append(psutil.Process(worker["pid"]))
    if not processes:
        return
    with suppress(psutil.Error):
        frontend = next((p for p in processes[0].parents() if p.name() == "java"), None)
        used = sum(p.memory_full_info().uss for p in processes) / 2**20
        yield Finding("ok", f"{len(processes)} workers use {used:.0f} MiB")
        if frontend is not None:
            limit = frontend.rlimit(psutil.RLIMIT_NOFILE)[0]
            descriptors = frontend.num_fds()
            few = descriptors > 0.8 * limit
            yield Finding(
                "warning" if few else "ok",
                f"the frontend has {descriptors} of {limit} file descriptors",
                "each connection is one: raise `ulimit -n`, or limit connections at the edge" if few else "",
            )
    memory = psutil.virtual_memory()
    if memory.available < LITTLE_MEMORY * memory.total:
        yield Finding("warning", f"{memory.available / 2**20:.0f} MiB of memory are left", "workers will be killed; scale down")
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < LITTLE_DISK:
        yield Finding("warning", f"{free / 2**20:.0f} MiB are free in {tempfile.gettempdir()}", "models are unpacked there")


def _counters(service: Addresses) -> Iterator[Finding]:
    try:
        text = requests.get(f"{service.metrics}/metrics", timeout=5).text
    except requests.RequestException as error:
        yield Finding("warning", f"the metrics at {service.metrics} cannot be read ({type(error).__name__})")
        return

    def total(pattern: str) -> float:
        return sum(float(value) for value in re.findall(rf"^{pattern}\S* (\S+)$", text, re.MULTILINE))

    good, bad, broken = (total(rf"Requests{n}XX\{{") for n in (2, 4, 5))
    answers = good + bad + broken
    yield Finding(
        "warning" if broken > 0.01 * answers else "ok",
        f"{answers:.0f} answers since the start: {good:.0f} 2xx, {bad:.0f} 4xx, {broken:.0f} 5xx",
        "503 is overload, 500 a worker that died; the log says when" if broken > 0.01 * answers else "",
    )
    faults = total(r'CaptionErrors\{Code="InternalError"')
    if faults:
        yield Finding("warning", f"{faults:.0f} requests failed in a way that they should not", "the log has the stack traces")
    requests_seen, waited = total(r"ts_inference_requests_total\{"), total(r"ts_queue_latency_microseconds\{")
    if requests_seen and waited / requests_seen > LONG_QUEUE_SECONDS * 1e6:
        yield Finding(
            "warning",
            f"a request waited for {waited / requests_seen / 1e6:.1f} s in the queue, on average",
            "add workers or replicas",
        )


def _openness(service: Addresses) -> Iterator[Finding]:
    """What can be reached, and by whom."""
    open_to_all = urlsplit(service.management).hostname not in LOOPBACK
    with suppress(requests.RequestException):
        url = f"{service.management}/models"
        # An archive that is not there: 405 where models cannot be registered, another error where they can.
        status = requests.post(url, params={"url": "no-such-archive.mar"}, headers=bearer("management"), timeout=5).status_code
        if status == 405:
            yield Finding("ok", "models cannot be registered or replaced through the management API")
        else:
            yield Finding(
                "warning" if open_to_all else "ok",
                "models can be registered through the management API (enable_model_api)",
                "whoever reaches it can replace the model: off when no update is being rolled" if open_to_all else "",
            )
    if open_to_all:
        yield Finding("warning", f"the management API is not on the loopback: {service.management}", "close it: SECURITY.md")
    with suppress(requests.RequestException):
        without = requests.get(f"{service.management}/models", timeout=5).status_code
        if without == 200 and urlsplit(service.inference).hostname not in LOOPBACK:
            yield Finding(
                "warning", "no token is asked for", "disable_token_authorization=false, or an edge that authenticates"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inference", default="http://127.0.0.1:8080")
    parser.add_argument("--management", default="http://127.0.0.1:8081")
    parser.add_argument("--metrics", default="http://127.0.0.1:8082")
    parser.add_argument("--model", default="caption")
    arguments = parser.parse_args()
    findings = []
    for finding in examine(Addresses(arguments.inference, arguments.management, arguments.metrics, arguments.model)):
        print(finding, flush=True)
        findings.append(finding)
    sys.exit(1 if any(finding.state == "broken" for finding in findings) else 0)


if __name__ == "__main__":
    main()
