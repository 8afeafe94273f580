"""How the service bears what the internet sends: `python -m scripts.scorecard --output docs/scorecard`.

Hostile and odd files and requests, one photo in many encodings, decompression bombs beside good requests, five times the
load that it can carry, killed workers, and its memory over thousands of requests. Against a service that runs elsewhere
(`--url`) everything is measured that its addresses allow; without it a service is started for the purpose.

Writes PATH.md and PATH.json, and exits with 1 when something that must hold does not.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import platform
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import requests
from PIL import Image

from scripts.authorization import bearer
from scripts.package_mar import package
from scripts.probe import not_ready
from scripts.server import ROOT, TorchServe, free_settings
from tests import corpus
from tests.corpus import ImageCase, RequestCase

SAMPLES = sorted((ROOT / "samples").glob("*.jpg"))
AT_ONCE = 16
OVERLOAD = 5
MIB = 2**20


@dataclass(frozen=True)
class Answer:
    status: int
    """0: the connection was closed, or the time was over, before an answer came."""
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    """Names in lower case."""
    seconds: float = 0.0

    @property
    def caption(self) -> str:
        """The best caption of an answer to a single image."""
        return json.loads(self.body)["captions"][0]["caption"]


@dataclass(frozen=True)
class Service:
    """Where a running service is reached. What is known of its processes is known through the management API."""

    inference: str
    management: str | None = None
    model: str = "caption"
    key_file: Path | None = None

    def send(self, case: RequestCase, timeout: float = 60.0) -> Answer:
        """Send a request as it is, which no HTTP library would do for the odder ones."""
        address = urlsplit(self.inference)
        head = f"{case.method} {case.path.format(model=self.model)} HTTP/1.1\r\n"
        names = {name.lower() for name, _ in case.headers}
        if "host" not in names:
            head += f"Host: {address.netloc}\r\n"
        if "authorization" not in names:
            head += "".join(f"{name}: {value}\r\n" for name, value in bearer("inference", self.key_file).items())
        head += "".join(f"{name}: {value}\r\n" for name, value in case.headers)
        data = head.encode() + case.raw_headers + f"Content-Length: {len(case.body)}\r\n\r\n".encode() + case.body
        began = time.monotonic()
        try:
            with socket.create_connection((address.hostname, address.port or 80), timeout=timeout) as connection:
                with suppress(ConnectionError):  # it may answer, and close, before it has read everything
                    connection.sendall(data)
                response = http.client.HTTPResponse(connection, method=case.method)
                try:
                    response.begin()
                    body = response.read()
                finally:
                    response.close()
        except (OSError, http.client.HTTPException):
            return Answer(0, seconds=time.monotonic() - began)
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, body, headers, time.monotonic() - began)

    def predict(self, image: bytes, timeout: float = 60.0) -> Answer:
        """Caption an image that is sent as the raw body."""
        kind = (("Content-Type", "application/octet-stream"),)
        return self.send(RequestCase("", image, corpus.GOOD, kind), timeout)

    def workers(self) -> list[int]:
        """The process numbers of all READY workers; empty when there is no management API to ask."""
        if self.management is None:
            return []
        versions = requests.get(
            f"{self.management}/models/{self.model}/all", headers=bearer("management", self.key_file), timeout=10
        ).json()
        return sorted(w["pid"] for version in versions for w in version["workers"] if w["status"] == "READY")

    def processes(self) -> list[psutil.Process]:
        """The frontend, the workers and their children, where they run on this machine."""
        with suppress(psutil.Error, IndexError):
            worker = psutil.Process(self.workers()[0])
            frontend = next(p for p in worker.parents() if p.name() == "java")
            return [frontend, *frontend.children(recursive=True)]
        return []

    def memory(self) -> dict[str, int]:
        """Bytes that are nobody else's, of the frontend and of the workers with their children."""
        used = {"frontend": 0, "workers": 0}
        for process in self.processes():
            with suppress(psutil.Error):
                used["frontend" if process.name() == "java" else "workers"] += process.memory_full_info().uss
        return used


# ----------------------------------------------------------------------------------------------------- measurements


@dataclass(frozen=True)
class CorpusResult:
    tried: int
    server_errors: list[str]
    """What was answered with a 5xx, or not at all where an answer must come."""
    unexpected: list[str]
    """What was answered with a status that it may not have."""
    valid: int
    valid_captioned: int
    must_reject: int
    rejected: int
    worker_deaths: int


def run_corpus(
    service: Service, images: Sequence[ImageCase], whole_requests: Sequence[RequestCase], at_once: int = 8
) -> CorpusResult:
    """Send every file, then every request, `at_once` at a time."""
    before = service.workers()
    kind = (("Content-Type", "application/octet-stream"),)
    cases = [RequestCase(case.name, case.data, case.statuses, kind) for case in images] + list(whole_requests)
    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(service.send, cases))
    found = list(zip(cases, (answer.status for answer in answers), strict=True))
    valid = [status for case, status in found if case.statuses == corpus.GOOD]
    rejects = [status for case, status in found if 200 not in case.statuses]
    return CorpusResult(
        tried=len(found),
        server_errors=[f"{case.name}: {s}" for case, s in found if s >= 500 and s not in case.statuses],
        unexpected=[f"{case.name}: {s}, not {sorted(case.statuses)}" for case, s in found if s not in case.statuses],
        valid=len(valid),
        valid_captioned=valid.count(200),
        must_reject=len(rejects),
        rejected=sum(400 <= status < 500 for status in rejects),
        worker_deaths=len(set(before) - set(service.workers())),
    )


@dataclass(frozen=True)
class AgreementResult:
    photos: int
    encodings: int
    """Of each photo: formats, modes, ways of saving."""
    agreed: int
    """Of photos times encodings: those with the best caption of the same photo as a PNG."""
    others: list[str]


def agreement(service: Service, photos: Iterable[Path] = SAMPLES) -> AgreementResult:
    """Caption each photo in each faithful encoding."""
    agreed, others, counted, number = 0, [], 0, 0
    for path in photos:
        with Image.open(path) as image:
            photo = image.convert("RGB")
        encodings = [encoding for encoding in corpus.encodings(photo) if encoding.faithful]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(service.predict, (encoding.data for encoding in encodings)))
        captions = {e.name: a.caption if a.status == 200 else str(a.status) for e, a in zip(encodings, answers, strict=True)}
        agreed += sum(caption == captions["PNG"] for caption in captions.values())
        others += [f"{path.stem} as {name}: {caption}" for name, caption in captions.items() if caption != captions["PNG"]]
        counted, number = counted + 1, len(encodings)
    return AgreementResult(counted, number, agreed, others)


@dataclass(frozen=True)
class BombResult:
    bombs: int
    bombs_refused: int
    slowest_bomb_ms: float
    good: int
    good_failed: int
    good_p50_ms: float
    good_p99_ms: float
    alone_p99_ms: float
    """Of good requests without bombs beside them, in the same run."""
    peak_workers_mib: float
    peak_frontend_mib: float
    worker_deaths: int


def bombs_beside_good(service: Service, seconds: float = 10.0, at_once: int = AT_ONCE) -> BombResult:
    """`at_once` clients that send nothing but bombs beside two that send photos."""
    photos = [path.read_bytes() for path in SAMPLES]
    bombs = [case.data for case in corpus.named_bombs()]
    before = service.workers()

    def client(data: bytes) -> Callable[[], Answer]:
        return lambda: service.predict(data)

    good_clients = [client(photo) for photo in photos[:2]]
    alone = _for(seconds / 2, good_clients)
    with peak_memory(service) as peak:
        answers = _for(seconds, good_clients + [client(bombs[number % len(bombs)]) for number in range(at_once)])
    good = answers[0] + answers[1]
    refused = [answer for client in answers[2:] for answer in client]
    return BombResult(
        bombs=len(refused),
        bombs_refused=sum(answer.status == 413 for answer in refused),
        slowest_bomb_ms=round(max(answer.seconds for answer in refused) * 1e3, 1),
        good=len(good),
        good_failed=sum(answer.status != 200 for answer in good),
        good_p50_ms=percentile(good, 50),
        good_p99_ms=percentile(good, 99),
        alone_p99_ms=percentile(alone[0] + alone[1], 99),
        peak_workers_mib=round(peak["workers"] / MIB),
        peak_frontend_mib=round(peak["frontend"] / MIB),
        worker_deaths=len(set(before) - set(service.workers())),
    )


@dataclass(frozen=True)
class OverloadResult:
    capacity_per_second: float
    offered_per_second: float
    answered: dict[str, int]
    """How many requests got which status; 0 is no answer."""
    shed_p99_ms: float
    accepted_p50_ms: float
    accepted_p99_ms: float
    recovered_after_s: float
    """From the last request of the overload to a photo that is captioned as fast as before it (three times its p99)."""


def overload(service: Service, seconds: float = 8.0, times: int = OVERLOAD) -> OverloadResult:
    """Measure what the service can do, then offer it `times` as much."""
    photo = SAMPLES[0].read_bytes()
    closed = _for(seconds / 2, [lambda: service.predict(photo)] * 16)
    usual = [answer for client in closed for answer in client if answer.status == 200]
    capacity = len(usual) / (seconds / 2)
    alone = _for(1.0, [lambda: service.predict(photo)])[0]
    offered = times * capacity
    answers: list[Answer] = []
    with ThreadPoolExecutor(min(1000, 400 + int(offered))) as pool:
        began = time.monotonic()
        futures = []
        for number in range(int(offered * seconds)):
            time.sleep(max(0.0, began + number / offered - time.monotonic()))
            futures.append(pool.submit(service.predict, photo))
        ended = time.monotonic()
        answers = [future.result() for future in futures]
    while service.predict(photo).seconds > 3 * percentile(alone, 99) / 1e3:
        if time.monotonic() > ended + 120:
            break
    recovered = time.monotonic() - ended
    accepted = [answer for answer in answers if answer.status == 200]
    shed = [answer for answer in answers if answer.status != 200]
    return OverloadResult(
        capacity_per_second=round(capacity, 1),
        offered_per_second=round(len(answers) / (ended - began), 1),
        answered={str(status): n for status, n in sorted(Counter(answer.status for answer in answers).items())},
        shed_p99_ms=percentile(shed, 99),
        accepted_p50_ms=percentile(accepted, 50),
        accepted_p99_ms=percentile(accepted, 99),
        recovered_after_s=round(recovered, 1),
    )


@dataclass(frozen=True)
class KillResult:
    sent: int
    lost: dict[str, int]
    """Requests that got no caption, by their status."""
    recovery_s: float
    """From the kill to the first caption by a worker that is READY again."""


def kill_worker(service: Service, clients: int = 4, number: signal.Signals = signal.SIGKILL) -> KillResult:
    """Kill a worker while `clients` send photos one after the other, and wait until all workers are READY again."""
    photo = SAMPLES[0].read_bytes()
    workers = service.workers()
    over = threading.Event()
    answers: list[Answer] = []

    def client() -> None:
        while not over.is_set():
            answers.append(service.predict(photo, timeout=180))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    os.kill(workers[0], number)
    killed = time.monotonic()
    while time.monotonic() < killed + 180:
        with suppress(requests.RequestException):
            now = service.workers()
            if len(now) == len(workers) and workers[0] not in now and service.predict(photo).status == 200:
                break
        time.sleep(0.1)
    recovery = time.monotonic() - killed
    time.sleep(1)
    over.set()
    for thread in threads:
        thread.join()
    lost = Counter(str(answer.status) for answer in answers if answer.status != 200)
    return KillResult(len(answers), dict(lost), round(recovery, 1))


@dataclass(frozen=True)
class MemoryResult:
    requests: int
    workers_mib_per_10000: float
    frontend_mib_per_10000: float
    file_descriptors: int
    """More than before."""
    files: int
    """More than before, in the temporary directories of the processes."""


def memory_growth(service: Service, number: int = 2000, warm_up: int = 300) -> MemoryResult:
    """Good, bad and hostile requests in turn, after a `warm_up` that fills the caches."""
    images = [*(path.read_bytes() for path in SAMPLES), *(case.data for case in corpus.images()[::40])]

    def send(count: int) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(service.predict, itertools.islice(itertools.cycle(images), count)))

    send(warm_up)
    memory, descriptors, files = service.memory(), open_files(service), temporary_files(service)
    send(number)
    time.sleep(1)
    grown = {name: (used - memory[name]) / MIB / number * 10_000 for name, used in service.memory().items()}
    return MemoryResult(
        requests=number,
        workers_mib_per_10000=round(grown["workers"], 1),
        frontend_mib_per_10000=round(grown["frontend"], 1),
        file_descriptors=open_files(service) - descriptors,
        files=len(temporary_files(service) - files),
    )


def open_files(service: Service) -> int:
    """File descriptors of the workers and their children. The frontend's are its clients' connections."""
    count = 0
    for process in service.processes():
        with suppress(psutil.Error):
            count += process.num_fds() if process.name() != "java" else 0
    return count


def temporary_files(service: Service) -> set[Path]:
    """What lies in the temporary directories of the service's processes."""
    folders = set()
    for process in service.processes():
        with suppress(psutil.Error):
            folders.add(Path(process.environ().get("TMPDIR", "/tmp")))
    return {path for folder in folders for path in folder.rglob("*")}


def percentile(answers: Sequence[Answer], percent: int) -> float:
    """Milliseconds; 0 of none."""
    if len(answers) < 2:
        return round(sum(answer.seconds for answer in answers) * 1e3, 1)
    return round(statistics.quantiles((a.seconds for a in answers), n=100, method="inclusive")[percent - 1] * 1e3, 1)


def _for(seconds: float, clients: Sequence[Callable[[], Answer]]) -> list[list[Answer]]:
    """Let each client send one request after the other for `seconds`: the answers that each got."""
    end = time.monotonic() + seconds

    def run(client: Callable[[], Answer]) -> list[Answer]:
        answers = []
        while time.monotonic() < end:
            answers.append(client())
        return answers

    with ThreadPoolExecutor(len(clients)) as pool:
        return list(pool.map(run, clients))


@contextmanager
def peak_memory(service: Service) -> Iterator[dict[str, int]]:
    """The highest `Service.memory` in the meantime, looked at five times a second."""
    peak = service.memory()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            for name, used in service.memory().items():
                peak[name] = max(peak[name], used)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


# ------------------------------------------------------------------------------------------------------------ report


@dataclass(frozen=True)
class Scorecard:
    machine: str
    corpus: CorpusResult
    agreement: AgreementResult
    bombs: BombResult
    overload: OverloadResult
    memory: MemoryResult | None = None
    kill: KillResult | None = None
    cold_start_s: float | None = None

    def rows(self) -> list[tuple[str, str, bool | None]]:
        """What was measured, the result, and whether it is as it must be (None: a figure that must not be anything)."""
        corpus, same, bombs, load = self.corpus, self.agreement, self.bombs, self.overload
        compared = same.photos * same.encodings
        rows: list[tuple[str, str, bool | None]] = [
            ("hostile, odd and ordinary inputs tried", f"{corpus.tried:,}", None),
            ("answered with a 5xx", str(len(corpus.server_errors)), not corpus.server_errors),
            ("answered otherwise than they may be", str(len(corpus.unexpected)), not corpus.unexpected),
            ("valid ones captioned", f"{corpus.valid_captioned} of {corpus.valid}", corpus.valid_captioned == corpus.valid),
            ("must-reject answered 4xx", f"{corpus.rejected} of {corpus.must_reject}", corpus.rejected == corpus.must_reject),
            ("workers that died of them", str(corpus.worker_deaths), corpus.worker_deaths == 0),
            (
                f"one photo, one caption: {same.photos} photos, each in {same.encodings} encodings",
                f"{same.agreed} of {compared} ({same.agreed / compared:.1%})",
                None,
            ),
            (f"bombs sent by {AT_ONCE} clients at once", f"{bombs.bombs:,}", None),
            ("bombs refused with 413", f"{bombs.bombs_refused:,}", bombs.bombs_refused == bombs.bombs),
            ("good requests beside them that failed", f"{bombs.good_failed} of {bombs.good}", bombs.good_failed == 0),
            ("p99 of good requests beside them (alone)", f"{bombs.good_p99_ms} ms ({bombs.alone_p99_ms} ms)", None),
            (
                "peak memory meanwhile: workers, frontend",
                f"{bombs.peak_workers_mib:.0f} MiB, {bombs.peak_frontend_mib:.0f} MiB",
                None,
            ),
            (
                f"overload, {OVERLOAD} × capacity ({load.capacity_per_second}/s): statuses",
                ", ".join(f"{n:,} × {status}" for status, n in load.answered.items()),
                set(load.answered) <= {"200", "429", "503"},
            ),
            ("p99 of the refusals", f"{load.shed_p99_ms} ms", None),
            ("p99 of the accepted", f"{load.accepted_p99_ms} ms", None),
            ("as fast as before after", f"{load.recovered_after_s} s", None),
        ]
        if self.memory is not None:
            grown = f"{self.memory.workers_mib_per_10000} MiB, {self.memory.frontend_mib_per_10000} MiB"
            rows += [
                (f"memory growth per 10,000 requests ({self.memory.requests:,} sent): workers, frontend", grown, None),
                ("file descriptors more than before", str(self.memory.file_descriptors), self.memory.file_descriptors <= 8),
                ("files left by requests", str(self.memory.files), self.memory.files == 0),
            ]
        if self.kill is not None:
            lost = ", ".join(f"{n} × {status}" for status, n in self.kill.lost.items()) or "none"
            rows.append((f"requests lost by a worker's kill -9 ({self.kill.sent} sent)", lost, "0" not in self.kill.lost))
            rows.append(("seconds from the kill to the next caption", str(self.kill.recovery_s), None))
        if self.cold_start_s is not None:
            rows.append(("cold start: from the command to the first caption", f"{self.cold_start_s:.1f} s", None))
        return rows

    def markdown(self) -> str:
        lines = ["# Scorecard", "", "`python -m scripts.scorecard` on " + self.machine + ".", ""]
        lines += ["| measured | result | |", "| --- | --- | --- |"]
        lines += [
            f"| {what} | {result} | {'' if good is None else 'ok' if good else '**no**'} |"
            for what, result, good in self.rows()
        ]
        for title, items in (
            ("Answered otherwise than they may be", self.corpus.unexpected),
            ("Captioned otherwise than the same photo as PNG", self.agreement.others),
        ):
            if items:
                lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
        return "\n".join(lines) + "\n"

    def passed(self) -> bool:
        return all(good is not False for _, _, good in self.rows())


def measure(
    service: Service, *, kill: bool, requests_for_memory: int, quick: bool = False, cold_start_s: float | None = None
) -> Scorecard:
    """Everything that the service's addresses allow.

    quick: of the damaged files every fourth, one photo instead of four, and half the time under bombs and overload.
    """
    images = corpus.images()
    if quick:
        images = [case for case in images if "," not in case.name] + [case for case in images if "," in case.name][::4]
    part = 0.5 if quick else 1.0
    local = bool(service.processes())
    machine = f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}"
    return Scorecard(
        machine=machine,
        corpus=_told("corpus", lambda: run_corpus(service, images, corpus.requests())),
        agreement=_told("one photo, one caption", lambda: agreement(service, SAMPLES[1:2] if quick else SAMPLES)),
        bombs=_told("bombs", lambda: bombs_beside_good(service, 10 * part)),
        overload=_told("overload", lambda: overload(service, 8 * part)),
        memory=_told("memory", lambda: memory_growth(service, requests_for_memory)) if local else None,
        kill=_told("kill", lambda: kill_worker(service)) if kill and local else None,
        cold_start_s=cold_start_s,
    )


def _told(name: str, measurement: Callable[[], Any]) -> Any:
    began = time.monotonic()
    result = measurement()
    print(f"{name}: {time.monotonic() - began:.0f} s: {result}", file=sys.stderr, flush=True)
    return result


@contextmanager
def own_service(checkpoint: Path) -> Iterator[tuple[Service, float]]:
    """A service of this checkout, and the seconds from its start to its first caption."""
    with tempfile.TemporaryDirectory() as store:
        settings = ROOT / "deploy/torchserve/model-config.yaml"
        package(checkpoint, Path(store) / "caption.mar", name="caption", model_config=settings)
        began = time.monotonic()
        with TorchServe(free_settings() | {"model_store": store}) as running:
            running.wait_until_ready()
            service = Service(running.address("inference"), running.address("management"))
            service.predict(SAMPLES[0].read_bytes())
            yield service, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="the inference API of a running service; without it one is started")
    parser.add_argument("--management", help="its management API; if it runs on this machine its processes are measured, too")
    parser.add_argument("--model", default="caption")
    parser.add_argument("--kill", action="store_true", help="kill a worker of the service at --url, too")
    parser.add_argument("--quick", action="store_true", help="less of everything; for a look")
    parser.add_argument("--requests", type=int, default=2000, help="for the growth of memory (default: 2000)")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "weights/en", help="of the service that is started")
    parser.add_argument("--output", type=Path, metavar="PATH", help="write PATH.md and PATH.json; default: print the first")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is stopped
    if arguments.url:
        service = Service(arguments.url.rstrip("/"), arguments.management, arguments.model)
        if arguments.management and (reason := not_ready(arguments.management, arguments.model)):
            sys.exit(f"error: {reason}")
        card = measure(service, kill=arguments.kill, requests_for_memory=arguments.requests, quick=arguments.quick)
    else:
        with own_service(arguments.checkpoint) as (service, seconds):
            number, quick = arguments.requests, arguments.quick
            card = measure(service, kill=True, requests_for_memory=number, quick=quick, cold_start_s=seconds)
    if arguments.output is None:
        print(card.markdown())
    else:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.with_suffix(".md").write_text(card.markdown())
        arguments.output.with_suffix(".json").write_text(json.dumps(asdict(card), indent=1) + "\n")
    sys.exit(0 if card.passed() else 1)


if __name__ == "__main__":
    main()
