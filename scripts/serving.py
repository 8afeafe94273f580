"""How the service uses the machine it is on: the one place where workers, threads and queues are decided.

`python -m scripts.benchmark --plans` compares other numbers with these; see docs/performance.md. Every one can be set by
the environment variable that carries it to TorchServe or to the handler. What does not depend on the machine is in
deploy/torchserve/model-config.yaml.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from handler.machine import available_cpus

THREADS_FROM_CPUS = {1: 1, 8: 2, 32: 4}
"""Threads of a worker on a machine of so many CPUs or more. One for each CPU in all: workers whose threads wait for a CPU
wait for each other. One thread each gives the most captions, but a worker takes memory, and a lone request one worker."""
MOST_THREADS_ALONE = 4
"""More do little for one image."""
WORKER_MIB = 1350
"""Memory of a worker: 550 of its own at most (in int8 it takes less), and 800 while a photo of 50 megapixels is decoded."""
MOST_WORKERS_A_GPU = 8
"""One for each two CPUs: photos are decoded by CPUs. More wait for each other's steps of the search, and each takes memory."""


@dataclass(frozen=True)
class Plan:
    workers: int
    threads: int
    """Of each worker."""
    threads_alone: int
    """Of each worker, for a photo that comes alone: the others have nothing to do then."""
    frontend_threads: int
    """That read requests, and that talk to the workers, of each kind. They only pass bytes on."""

    def environment(self) -> dict[str, str]:
        """The variables by which TorchServe and `handler.captioner.load_captioner` learn of it."""
        return {
            "TS_DEFAULT_WORKERS_PER_MODEL": str(self.workers),
            "TS_NUMBER_OF_NETTY_THREADS": str(self.frontend_threads),
            "TS_NETTY_CLIENT_THREADS": str(self.frontend_threads),
            "CAPTION_THREADS": str(self.threads),
            "CAPTION_THREADS_ALONE": str(self.threads_alone),
        }


def plan(*, cpus: int | None = None, memory: int | None = None, gpus: int | None = None) -> Plan:
    """The plan for this machine, or for one with so many CPUs, bytes of memory and GPUs."""
    cpus = available_cpus() if cpus is None else cpus
    memory = available_memory() if memory is None else memory
    gpus = available_gpus() if gpus is None else gpus
    threads = max(threads for least, threads in THREADS_FROM_CPUS.items() if least <= cpus)
    wanted = gpus * min(MOST_WORKERS_A_GPU, max(2, cpus // gpus // 2)) if gpus else cpus // threads
    workers = max(1, min(wanted, memory // (WORKER_MIB * 2**20)))
    return Plan(
        workers=workers,
        threads=max(1, cpus // workers),
        threads_alone=min(cpus, MOST_THREADS_ALONE),
        frontend_threads=min(max(2, cpus // 2), 8),
    )


def available_gpus(driver: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """GPUs that this machine has, or that TorchServe may use, whichever is less."""
    return min(len(list(driver.glob("*"))), int(os.environ.get("TS_NUMBER_OF_GPU") or 1024))


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this machine has, or that its container may use, whichever is less."""
    total = psutil.virtual_memory().total
    for limit in (cgroup / "memory.max", cgroup / "memory/memory.limit_in_bytes"):  # cgroup v2, and v1
        try:
            return min(total, int(limit.read_text()))
        except (OSError, ValueError):  # no such file, or v2's "max": no limit
            continue
    return total
