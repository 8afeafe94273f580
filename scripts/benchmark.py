"""Measure the service and its parts on this machine: `python -m scripts.benchmark --help`.

HTTP load comes from hey (https://github.com/rakyll/hey, a package of Debian). Everything is measured in one run, since only
ratios of one run say anything. docs/performance.md shows one and explains it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests
import torch
import yaml

from handler.beam_search import Search, Searcher, search
from handler.captioner import Captioner
from handler.checkpoint import load_checkpoint
from handler.engine import automatic, is_gpu
from handler.expansion import fold
from handler.machine import available_cpus
from handler.networks import load_encoder
from handler.torch_engine import TorchEngine
from handler.torch_expansion import PlainExpander, TorchExpander
from scripts.class_archive import create, is_current
from scripts.engines import ENGINES, captioners
from scripts.export import exporter
from scripts.package_mar import package
from scripts.server import CLASS_ARCHIVE, CONFIG, TorchServe, free_settings
from scripts.serving import plan

ROOT = Path(__file__).resolve().parent.parent
MODEL_CONFIG = ROOT / "deploy/torchserve/model-config.yaml"
PHOTO = ROOT / "samples/cat.jpg"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where models run, in this process and in the servers."""
Rows = list[dict[str, Any]]


class BenchmarkError(Exception):
    """Something that the benchmark needs is missing."""


# Parts


def best_time(work: Callable[[], object], seconds: float) -> float:
    """Milliseconds of one call: the least of several, since whatever else runs can only add to it."""
    work()
    best, deadline = float("inf"), time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        work()
        ended = time.perf_counter()
        best = min(best, ended - began)
        if ended > deadline:
            return best * 1e3


def measure_decoding(captioner: Captioner, seconds: float) -> Rows:
    rows = []
    for path in sorted((ROOT / "samples").glob("*.jpg")):
        data = path.read_bytes()
        rows.append({"photo": path.name, "ms": best_time(partial(captioner.prepare, data), seconds)})
    return rows


def measure_encoder(captioners: Mapping[str, Captioner], batches: Sequence[int], seconds: float) -> Rows:
    """Milliseconds for each image."""
    rows = []
    for name, captioner in captioners.items():
        size = captioner.config.preprocessing.size
        for batch in batches:
            pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, size, size), np.uint8)
            ms = best_time(partial(captioner.engine.encode, pixels), seconds)
            rows.append({"engine": name, "batch": batch, "ms": ms / batch})
    return rows


def encode_for(captioner: Captioner, batch: int, seconds: float) -> np.ndarray:
    """Milliseconds of each batch, one after the other for so long."""
    size = captioner.config.preprocessing.size
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, size, size), np.uint8)
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while not times or time.perf_counter() < deadline:
        began = time.perf_counter()
        captioner.engine.encode(pixels)
        times.append((time.perf_counter() - began) * 1e3)
    return np.array(times)


def measure_search(
    captioner: Captioner, checkpoint: Path, beams: Sequence[int], batches: Sequence[int], seconds: float
) -> Rows:
    """Milliseconds for each image, by the plain search and by the one that serves."""
    loaded = load_checkpoint(checkpoint, with_encoder=False)
    photos = [captioner.prepare(path.read_bytes()).pixels for path in sorted((ROOT / "samples").glob("*.jpg"))]
    features = captioner.encode(photos)
    device = captioner.engine.device
    end = loaded.vocabulary.end_index
    plain = PlainExpander(loaded.decoder.to(device), captioner.forbidden, device)
    searchers: dict[str, Searcher] = {"plain": partial(search, plain, end_token=end)}
    if is_gpu(device):
        folded = TorchExpander(fold(loaded.weights, captioner.forbidden), device)
        searchers |= {"folded": partial(search, folded, end_token=end), "CUDA graph": captioner.searcher}
    else:
        searchers |= {captioner.engine.name.split("-")[0]: captioner.searcher}
    settings = loaded.config.search
    start = loaded.vocabulary.index[loaded.config.languages[0].start_token]
    rows = []
    for name, searcher in searchers.items():
        for beam in beams:
            for batch in batches:
                wanted = [Search(start, beam, settings.max_length, settings.length_penalty)] * batch
                work = partial(searcher, features[np.arange(batch) % len(features)], wanted)
                rows.append({"search": name, "beam": beam, "batch": batch, "ms": best_time(work, seconds) / batch})
    return rows


# Load


@dataclass(frozen=True)
class Load:
    """What a load generator saw, and what it cost the server."""

    clients: int
    rate: float | None
    """Requests a second that were sent whether or not answers came (open loop); None: each client waits (closed loop)."""
    throughput: float
    p50: float
    p90: float
    p99: float
    """Milliseconds."""
    errors: int
    cpu: float | None
    """CPUs busy on average, in the server's processes."""

    def row(self) -> dict[str, Any]:
        return dict(vars(self))


def load_generator() -> str:
    """Path of hey, which is installed where that is possible. Raises BenchmarkError."""
    if shutil.which("hey") is None and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "hey"], check=False, stdout=sys.stderr)
    path = shutil.which("hey")
    if path is None:
        raise BenchmarkError("hey is missing: sudo apt-get install hey, or see https://github.com/rakyll/hey")
    return path


def put_load(url: str, *, clients: int, requests_sent: int, rate: float | None = None, pid: int | None = None) -> Load:
    """rate: of all clients together; enough of them make the loop an open one, since a late answer delays its client alone."""
    each = max(1, requests_sent // clients)
    used, began = _cpu_seconds(pid), time.monotonic()
    if rate is None:
        parts = [_hey(url, clients, each * clients)]
    else:
        # The clients of one process would all send at the same moment.
        def client(number: int) -> tuple[list[float], float]:
            time.sleep(number / rate)
            return _hey(url, 1, each, rate / clients)

        with ThreadPoolExecutor(clients) as pool:
            parts = list(pool.map(client, range(clients)))
    used = None if used is None else (_cpu_seconds(pid) or 0.0) - used
    cpu = None if used is None else used / (time.monotonic() - began)
    good = [ms for times, _ in parts for ms in times]
    if not good:
        raise BenchmarkError(f"no request to {url} was answered with 200")
    p50, p90, p99 = (float(value) for value in np.percentile(good, [50, 90, 99]))
    throughput = sum(len(times) / seconds for times, seconds in parts)
    return Load(clients, rate, throughput, p50, p90, p99, each * clients - len(good), cpu)


def _hey(url: str, clients: int, count: int, rate: float | None = None) -> tuple[list[float], float]:
    """rate: of each client. The good answers' times in milliseconds, and the seconds that all took."""
    command = [load_generator(), "-n", str(count), "-c", str(clients), "-m", "POST", "-T", "image/jpeg", "-D", str(PHOTO)]
    command += ["-t", "60", "-o", "csv", *(["-q", f"{rate:.6f}"] if rate is not None else []), url]
    began = time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.monotonic() - began
    answers = csv.DictReader(io.StringIO(done.stdout))
    return [float(a["response-time"]) * 1e3 for a in answers if a["status-code"] == "200"], seconds


def _cpu_seconds(pid: int | None) -> float | None:
    if pid is None:
        return None
    root = psutil.Process(pid)
    times = [process.cpu_times() for process in [root, *root.children(recursive=True)]]
    return sum(t.user + t.system for t in times)


def memory_of_workers(pid: int) -> list[float]:
    """MiB of each worker, memory that several share divided among them (PSS)."""
    workers = [p for p in psutil.Process(pid).children(recursive=True) if "model_service_worker" in " ".join(p.cmdline())]
    return [p.memory_full_info().pss / 2**20 for p in workers]


def free_gpu_mib() -> float:
    return torch.cuda.mem_get_info()[0] / 2**20 if DEVICE == "cuda" else 0.0


# Servers


@contextlib.contextmanager
def served(archive: Path, environment: Mapping[str, str]) -> Iterator[TorchServe]:
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with TorchServe(free_settings() | {"model_store": str(archive.parent)}, config=CONFIG) as server:
            server.wait_until_ready()
            yield server
    finally:
        os.environ.clear()
        os.environ.update(before)


def url_of(server: TorchServe) -> str:
    return f"{server.address('inference')}/predictions/caption"


@contextlib.contextmanager
def flask_style(checkpoint: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "scripts.flask_style", str(checkpoint.resolve()), str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise BenchmarkError("the Flask-style server has not started")
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()


def measure_service(server: TorchServe, concurrencies: Sequence[int], seconds: float) -> tuple[Rows, Load]:
    """Closed loop at each concurrency, then open loop below and above what the best of them reached; and that best one."""
    url, pid = url_of(server), server.pid
    # A first round so that no figure has the JVM's own warm-up in it, and to know how many requests take `seconds`.
    rate = put_load(url, clients=8, requests_sent=200 if seconds > 1 else 16).throughput
    loads = []
    for clients in concurrencies:
        loads.append(put_load(url, clients=clients, requests_sent=int(rate * seconds), pid=pid))
        rate = max(loads[-1].throughput, 1.0)
    best = max(loads, key=lambda load: load.throughput)
    for share in (0.5, 0.8, 1.2):
        wanted = best.throughput * share
        # With 100 clients each is due only so seldom that it has its answer by then, unless the server falls behind.
        loads.append(put_load(url, clients=100, requests_sent=int(2 * wanted * seconds), rate=wanted, pid=pid))
    return [load.row() for load in loads], best


def measure_in_turns(
    server: TorchServe, captioner: Captioner, best: Load, lone: float, batch: int, seconds: float, rounds: int
) -> Rows:
    """The service and, while it has nothing to do, the encoder alone on all CPUs or the GPU; a row for each round.

    What else the machine is busy with changes from minute to minute: only what is measured together can be compared.
    lone: requests a second of one client.
    """
    url, rows = url_of(server), []
    beam_1 = url.replace("/predictions/caption", "/models/caption/invoke?beam_size=1")
    for _ in range(rounds):
        alone = put_load(url, clients=1, requests_sent=int(lone * seconds / 2))
        encoder_alone = encode_for(captioner, 1, seconds / 4)
        many = put_load(url, clients=best.clients, requests_sent=int(best.throughput * seconds))
        encoder_many = encode_for(captioner, batch, seconds / 2)
        greedy = put_load(beam_1, clients=best.clients, requests_sent=int(best.throughput * seconds))
        rows.append(
            {
                "lone_p50": alone.p50,
                "encoder_p50": float(np.median(encoder_alone)),
                "throughput": many.throughput,
                "encoder_throughput": batch * 1e3 / float(encoder_many.mean()),
                "beam_1_throughput": greedy.throughput,
            }
        )
    return rows


def _plans() -> list[tuple[int, int]]:
    """Workers and threads of each to compare with the plan, by the CPUs that there are."""
    cpus = available_cpus()
    if DEVICE == "cuda":
        return [(workers, max(1, cpus // workers)) for workers in (1, 2, 4, 8, 16) if workers <= cpus]
    return [(1, cpus), (cpus, 1), (2, cpus), (3, cpus)]


def measure_plan(archive: Path, workers: int, threads: int, seconds: float) -> dict[str, Any]:
    """One client alone, and many at once, with so many workers and threads of each."""
    environment = {"TS_DEFAULT_WORKERS_PER_MODEL": str(workers), "CAPTION_THREADS": str(threads)}
    clients, free = 128 if DEVICE == "cuda" else 16, free_gpu_mib()
    with served(archive, environment) as server:
        url = url_of(server)
        rate = put_load(url, clients=clients, requests_sent=200 * workers).throughput
        many = put_load(url, clients=clients, requests_sent=int(rate * seconds))
        alone = put_load(url, clients=1, requests_sent=100)
        found = {
            "workers": workers,
            "threads": threads,
            "throughput": many.throughput,
            "p99": many.p99,
            "lone_p50": alone.p50,
            "memory_mib": sum(memory_of_workers(server.pid or 0)),
        }
        return found | ({"gpu_memory_mib": free - free_gpu_mib()} if DEVICE == "cuda" else {})


def measure_scaling(archive: Path, seconds: float) -> dict[str, Any]:
    """Throughput with one worker and with two, and what clients notice while the second is started."""
    with served(archive, {"TS_DEFAULT_WORKERS_PER_MODEL": "1"}) as server:
        url = url_of(server)
        one = put_load(url, clients=16, requests_sent=64)
        count = int(one.throughput * seconds)
        one = put_load(url, clients=16, requests_sent=count)
        command = ["-n", str(4 * count // 16 * 16), "-c", "16", "-m", "POST", "-T", "image/jpeg", "-D", str(PHOTO), "-o", "csv"]
        with subprocess.Popen([load_generator(), *command, url], stdout=subprocess.PIPE, text=True) as during:
            time.sleep(seconds / 4)
            scaled = requests.put(
                f"{server.address('management')}/models/caption?min_worker=2&max_worker=2&synchronous=true", timeout=120
            )
            output = during.communicate()[0]
        answered = sum(row["status-code"] == "200" for row in csv.DictReader(io.StringIO(output)))
        server.wait_until_ready()
        two = put_load(url, clients=16, requests_sent=count)
        memory = memory_of_workers(server.pid or 0)
    return {
        "status": scaled.status_code,
        "requests_while_scaling": 4 * count // 16 * 16,
        "failed_while_scaling": 4 * count // 16 * 16 - answered,
        "one_worker": one.throughput,
        "two_workers": two.throughput,
        "worker_memory_mib": memory,
    }


# Cold start

_WORKER_START = """
import json, pathlib, sys, time
began = time.perf_counter()
import ts.model_service_worker
frontend = time.perf_counter()
import caption_handler
imports = time.perf_counter()
from handler.captioner import load_captioner
from handler.config import ServingConfig
here = pathlib.Path.cwd()
captioner = load_captioner(here / "checkpoint", here / "engine", ServingConfig())
weights = time.perf_counter()
captioner.warm_up()
ended = time.perf_counter()
print(json.dumps({"torchserve_imports": frontend - began, "imports": imports - frontend, "weights": weights - imports,
                  "warm_up": ended - weights}))
"""


def measure_cold_start(root: Path, archive: Path, times: int) -> dict[str, float]:
    """Seconds from the start of `scripts.server` of the checkout `root` to the first caption: the least of several."""
    results = [_first_caption(root, archive) for _ in range(times)]
    found = {"first_caption": min(results)}
    if root == ROOT:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            shutil.unpack_archive(archive, folder, "zip")
            environment = plan().environment() | os.environ | {"PYTHONPATH": folder}  # as TorchServe starts a worker
            command = [sys.executable, "-c", _WORKER_START]
            done = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
        found |= json.loads(done.stdout.splitlines()[-1])
        found["jvm_and_rest"] = found["first_caption"] - sum(v for k, v in found.items() if k != "first_caption")
    return found


_SERVER = """
import json, sys
from scripts.server import TorchServe
server = TorchServe(json.loads(sys.argv[1]))
server.start()
sys.stdin.read()
server.stop()
"""


def _first_caption(root: Path, archive: Path) -> float:
    settings = free_settings() | {"model_store": str(archive.parent)}
    url = f"{settings['inference_address']}/predictions/caption"
    began = time.monotonic()
    command = [sys.executable, "-c", _SERVER, json.dumps(settings)]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and time.monotonic() - began < 120:
            with contextlib.suppress(requests.RequestException):
                if requests.post(url, data=PHOTO.read_bytes(), timeout=30).status_code == 200:
                    took = time.monotonic() - began
                    process.communicate()
                    return took
            time.sleep(0.02)
        process.communicate()
    raise BenchmarkError(f"the server of {root} gives no caption")


# The whole run


def run(arguments: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """save: called with the report after each part, so that a run that is cut short has not measured for nothing."""
    quick: bool = arguments.quick
    seconds = 0.3 if quick else arguments.seconds
    part_seconds = 0.02 if quick else 0.5
    batches = (1, 2) if quick else (1, 2, 4, 8)
    load_generator()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        engines = ("torch-fp32", "openvino-bf16") if quick and DEVICE == "cpu" else ENGINES[DEVICE]
        loaded = captioners(arguments.checkpoint, folder, engines, DEVICE)
        serving = next(loaded[name] for name in automatic(DEVICE) if name in loaded)
        if DEVICE == "cuda":
            loaded["torch-fp16 without a graph"] = _without_graph(arguments.checkpoint)
        report: dict[str, Any] = {
            "machine": _machine(),
            "engine": serving.engine.name,
            "plan": vars(plan()),
            "decoding": measure_decoding(serving, part_seconds),
            "encoder": measure_encoder(loaded, batches, part_seconds),
            "search": measure_search(serving, arguments.checkpoint, (1, 5), batches, part_seconds),
        }
        save(report)
        del loaded

        archive, single = folder / "store/caption.mar", folder / "single/caption.mar"
        package(arguments.checkpoint, archive, name="caption", model_config=MODEL_CONFIG)
        one_at_a_time = folder / "model-config.yaml"
        one_at_a_time.write_text(yaml.safe_dump(yaml.safe_load(MODEL_CONFIG.read_text()) | {"batchSize": 1}))
        package(arguments.checkpoint, single, name="caption", model_config=one_at_a_time)

        if not is_current(CLASS_ARCHIVE):
            create(CLASS_ARCHIVE, {"model_store": str(archive.parent)})  # which the image has
        report["cold_start"] = measure_cold_start(ROOT, archive, 1 if quick else 2)
        if arguments.against is not None:
            checkout, other = arguments.against
            report["cold_start_of_other"] = measure_cold_start(checkout.resolve(), other.resolve(), 1 if quick else 2)

        with served(archive, {}) as server:
            concurrencies = (1, 2) if quick else (1, 2, 4, 8, 16, 32, *((64, 128) if DEVICE == "cuda" else ()))
            rows, best = measure_service(server, concurrencies, seconds)
            lone = rows[0]["throughput"]
            turns = measure_in_turns(server, serving, best, lone, batches[-1], seconds, 1 if quick else 4)
            report |= {"service": rows, "in_turns": turns, "worker_memory_mib": memory_of_workers(server.pid or 0), "plans": []}
            save(report)
        for shape in _plans() if arguments.plans else []:
            report["plans"].append(measure_plan(archive, *shape, seconds))
            save(report)
        slow = {"CAPTION_ENGINE": "torch-fp32", "TS_DEFAULT_WORKERS_PER_MODEL": "1", "CAPTION_THREADS": str(available_cpus())}
        with served(single, slow) as server:
            put_load(url_of(server), clients=1, requests_sent=5)
            eager = put_load(url_of(server), clients=8, requests_sent=max(8, int(10 * seconds)), pid=server.pid)
        with flask_style(arguments.checkpoint) as url:
            put_load(url, clients=1, requests_sent=3)
            flask = put_load(url, clients=4, requests_sent=max(4, int(8 * seconds)))
        report |= {"eager_behind_torchserve": eager.row(), "flask_style": flask.row()}
        save(report)
        report["scaling"] = measure_scaling(archive, seconds)
    report["ratios"] = {
        "service to encoder alone, throughput": _median(turns, "throughput", "encoder_throughput"),
        "lone request p50 to encoder alone at batch 1": _median(turns, "lone_p50", "encoder_p50"),
        "service to eager fp32 one at a time behind TorchServe": best.throughput / eager.throughput,
        "service to Flask-style": best.throughput / flask.throughput,
        "beam 5 to beam 1, time": _median(turns, "beam_1_throughput", "throughput"),
    }
    if "cold_start_of_other" in report:
        other_time = report["cold_start_of_other"]["first_caption"]
        report["ratios"]["cold start of the other version to this"] = other_time / report["cold_start"]["first_caption"]
    return report


def _median(rounds: Rows, one: str, other: str) -> float:
    """Of the ratios of the rounds."""
    return float(np.median([row[one] / row[other] for row in rounds]))


def _without_graph(checkpoint: Path) -> Captioner:
    loaded = load_checkpoint(checkpoint, with_encoder=False)
    engine = TorchEngine(load_encoder(checkpoint), loaded.config.preprocessing, name="torch-fp16", device=DEVICE)
    return Captioner(loaded, engine=engine)


def _machine() -> dict[str, Any]:
    models = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cpus": available_cpus(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "exporter": exporter(),
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else None,
    }


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


# Output


def as_markdown(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    parts = [
        f"{machine['gpu'] or machine['cpu']}, {machine['cpus']} CPUs, {machine['memory_gib']} GiB; engine {report['engine']}"
    ]
    for title in ("encoder", "search", "decoding", "service", "plans"):
        if not report[title]:
            continue
        parts.append(f"**{title}**\n\n{_table(report[title])}")
    parts.append(f"**in turns: milliseconds, and images a second**\n\n{_table(report['in_turns'])}")
    baselines = [
        {"server": "this service, best", **max(report["service"], key=lambda row: row["throughput"])},
        {"server": "eager fp32, one at a time, TorchServe", **report["eager_behind_torchserve"]},
        {"server": "Flask-style", **report["flask_style"]},
    ]
    parts.append(f"**baselines**\n\n{_table(baselines)}")
    parts.append(f"**cold start, seconds**\n\n{_table([report['cold_start']])}")
    parts.append(f"**ratios**\n\n{_table([{'ratio': k, 'value': v} for k, v in report['ratios'].items()])}")
    return "\n\n".join(parts) + "\n"


def _table(rows: Rows) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(_shown(row[name]) for name in names) + " |" for row in rows)])


def _shown(value: object) -> str:
    return (
        ""
        if value is None
        else f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else (f"{value:.0f}" if isinstance(value, float) else str(value))
    )


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Throughput against latency, the encoder by engine, and the servers side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2))
    closed = [row for row in report["service"] if row["rate"] is None]
    for quantile in ("p50", "p90", "p99"):
        left.plot([r["throughput"] for r in closed], [r[quantile] for r in closed], marker="o", label=quantile)
    for row in closed:
        left.annotate(str(row["clients"]), (row["throughput"], row["p50"]), textcoords="offset points", xytext=(4, -10))
    left.set(title="closed loop, by number of clients", xlabel="captions a second", ylabel="milliseconds")
    left.legend()
    for name in dict.fromkeys(row["engine"] for row in report["encoder"]):
        rows = [row for row in report["encoder"] if row["engine"] == name]
        middle.plot([r["batch"] for r in rows], [r["ms"] for r in rows], marker="o", label=name)
    middle.set(title="encoder alone", xlabel="batch", ylabel="milliseconds an image", ylim=(0, None))
    middle.legend()
    best = max(closed, key=lambda row: row["throughput"])["throughput"]
    bars = {
        "Flask-style": report["flask_style"]["throughput"],
        "eager fp32\nTorchServe": report["eager_behind_torchserve"]["throughput"],
        "this service": best,
    }
    right.bar(list(bars), list(bars.values()))
    right.set(title="throughput", ylabel="captions a second")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "weights/en")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/benchmark")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load")
    parser.add_argument("--plans", action="store_true", help="compare other numbers of workers and threads with the plan")
    parser.add_argument("--quick", action="store_true", help="a minute in which everything runs and no figure means much")
    parser.add_argument(
        "--against",
        type=Path,
        nargs=2,
        metavar=("CHECKOUT", "ARCHIVE"),
        help="another version and its packed model, called caption.mar, to compare the cold start with",
    )
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)

    def save(report: dict[str, Any]) -> None:
        (output / "benchmark.json").write_text(json.dumps(report, indent=1) + "\n")

    try:
        report = run(arguments, save)
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    save(report)
    (output / "benchmark.md").write_text(as_markdown(report))
    draw(report, output / "benchmark.png")
    print(f"{as_markdown(report)}\nall of it: {output}/benchmark.json, .md and .png")


if __name__ == "__main__":
    main()
