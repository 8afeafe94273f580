"""Workers and threads follow from the machine, and what a container may use of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from handler.machine import available_cpus
from scripts.serving import WORKER_MIB, plan

GIB = 2**30


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 8, 9, 16, 31, 32, 64])
def test_every_cpu_is_used_and_none_twice(cpus: int) -> None:
    found = plan(cpus=cpus, memory=512 * GIB, gpus=0)
    assert found.workers * found.threads <= cpus < (found.workers + 1) * found.threads
    assert found.threads <= 4


def test_memory_limits_the_workers_but_never_to_none() -> None:
    small = plan(cpus=64, memory=4 * GIB, gpus=0)
    assert small.workers == 4 * GIB // (WORKER_MIB * 2**20)
    assert small.threads == 64 // small.workers  # the fewer workers use the CPUs all the same
    assert plan(cpus=2, memory=GIB // 4, gpus=0).workers == 1


def test_gpus_have_workers_each() -> None:
    assert plan(cpus=16, memory=64 * GIB, gpus=2).workers == 4


def test_the_plan_reaches_torchserve_and_the_handler() -> None:
    environment = plan(cpus=2, memory=8 * GIB, gpus=0).environment()
    assert environment["TS_DEFAULT_WORKERS_PER_MODEL"] == "2"
    assert environment["CAPTION_THREADS"] == "1"


@pytest.mark.parametrize(("quota", "cpus"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", None), (None, None)])
def test_a_containers_quota_counts(tmp_path: Path, quota: str | None, cpus: int | None) -> None:
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    affinity = len(os.sched_getaffinity(0))
    assert available_cpus(tmp_path) == (affinity if cpus is None else min(cpus, affinity))
