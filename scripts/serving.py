"""How the service uses the machine it is on: the one place where workers, threads and queues are decided.

`python -m scripts.benchmark --plans` compares other numbers with these; see docs/performance.md. Every one can be set by
the environment variable that carries it to TorchServe or to the handler. What does not depend on the machine is in
deploy/torchserve/model-config.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from handler.machine import available_cpus

MAX_THREADS = 4
"""Of a worker. More cores are better used by more workers, each with photos of its own."""
WORKER_MIB = 700
"""Memory of a worker with its decoding process."""
WORKERS_A_GPU = 2
"""So that one decodes and searches while the other's encoder runs."""


@dataclass(frozen=True)
class Plan:
    workers: int
    threads: int
    """Of each worker."""
    frontend_threads: int
    """That read requests, and that talk to the workers, of each kind. They only pass bytes on."""

    def environment(self) -> dict[str, str]:
        """The variables by which TorchServe and `handler.captioner.load_captioner` learn of it."""
        return {
            "TS_DEFAULT_WORKERS_PER_MODEL": str(self.workers),
            "TS_NUMBER_OF_NETTY_THREADS": str(self.frontend_threads),
            "TS_NETTY_CLIENT_THREADS": str(self.frontend_threads),
            "CAPTION_THREADS": str(self.threads),
        }


def plan(*, cpus: int | None = None, memory: int | None = None, gpus: int | None = None) -> Plan:
    """The plan for this machine, or for one with so many CPUs, bytes of memory and GPUs."""
    cpus = available_cpus() if cpus is None else cpus
    memory = available_memory() if memory is None else memory
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if gpus is None else gpus
    threads = min(cpus, MAX_THREADS)
    # Two workers for each share of the CPUs, each of which can use all of it: while one decodes, searches or talks to the
    # frontend, the other's encoder has the CPUs, and a request that comes alone has them anyhow.
    workers = gpus * WORKERS_A_GPU if gpus else 2 * -(-cpus // MAX_THREADS) if cpus > 1 else 1
    return Plan(
        workers=max(1, min(workers, memory // (WORKER_MIB * 2**20))),
        threads=threads,
        frontend_threads=min(max(2, cpus // 2), 8),
    )


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this machine has, or that its container may use, whichever is less."""
    try:
        return min(psutil.virtual_memory().total, int((cgroup / "memory.max").read_text()))
    except (OSError, ValueError):
        return psutil.virtual_memory().total
