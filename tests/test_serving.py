"""Workers and threads follow from the machine, and what a container may use of it."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from handler.machine import available_cpus
from scripts.serving import WORKER_MIB, available_gpus, available_memory, plan

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


@pytest.mark.parametrize(("gpus", "cpus", "workers"), [(1, 16, 8), (2, 16, 8), (1, 4, 2), (1, 2, 2), (1, 64, 8), (4, 8, 8)])
def test_a_gpu_has_a_worker_for_each_two_cpus(gpus: int, cpus: int, workers: int) -> None:
    found = plan(cpus=cpus, memory=64 * GIB, gpus=gpus)
    assert found.workers == workers
    assert found.threads >= 1


@pytest.mark.parametrize(("allowed", "found"), [(None, 2), ("", 2), ("0", 0), ("1", 1), ("4", 2)])
def test_gpus_that_are_switched_off_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: str | None, found: int
) -> None:
    for name in ("0000:00:05.0", "0000:00:06.0"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv("TS_NUMBER_OF_GPU", raising=False)
    if allowed is not None:
        monkeypatch.setenv("TS_NUMBER_OF_GPU", allowed)
    assert available_gpus(tmp_path) == found
    assert available_gpus(tmp_path / "no driver") == 0


def test_the_plan_reaches_torchserve_and_the_handler() -> None:
    environment = plan(cpus=2, memory=8 * GIB, gpus=0).environment()
    assert environment["TS_DEFAULT_WORKERS_PER_MODEL"] == "2"
    assert environment["CAPTION_THREADS"] == "1"
    assert environment["CAPTION_THREADS_ALONE"] == "2"


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "25000", "cpu/cpu.cfs_period_us": "50000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "9900000", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "150000"}, 64),
        ({"cpu.max": "max 100000", "cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({}, 64),
    ],
    ids=["v2", "v2 half", "v2 none", "v1", "v1 half", "v1 more than there are", "v1 none", "v1 partly", "hybrid", "no cgroup"],
)
def test_a_containers_quota_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cpus: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert available_cpus(cgroup(tmp_path, files)) == cpus
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert available_cpus(tmp_path) == 1


@pytest.mark.parametrize(
    ("files", "limited"),
    [
        ({"memory.max": str(GIB // 8)}, True),
        ({"memory.max": "max"}, False),
        ({"memory/memory.limit_in_bytes": str(GIB // 8)}, True),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, False),
        ({}, False),
    ],
    ids=["v2", "v2 none", "v1", "v1 none", "no cgroup"],
)
def test_a_containers_memory_counts(tmp_path: Path, files: dict[str, str], limited: bool) -> None:
    total = psutil.virtual_memory().total
    assert available_memory(cgroup(tmp_path, files)) == (GIB // 8 if limited else total)


def cgroup(folder: Path, files: dict[str, str]) -> Path:
    """A folder like /sys/fs/cgroup with these files."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content + "\n")
    return folder
