"""What this process may use of the machine."""

from __future__ import annotations

import math
import os
from pathlib import Path


def available_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may use: of its affinity, and of its container's quota, whichever is less."""
    affinity = len(os.sched_getaffinity(0))
    for read in (_quota_v2, _quota_v1):
        try:
            quota, period = read(cgroup)
            if quota > 0 and period > 0:  # v1's "no quota" is -1
                return max(1, min(affinity, math.ceil(quota / period)))
        except (OSError, ValueError):  # no such file, or v2's "max": no quota
            continue
    return affinity


def _quota_v2(cgroup: Path) -> tuple[int, int]:
    """Microseconds of CPU time in each so many microseconds."""
    quota, period = (cgroup / "cpu.max").read_text().split()
    return int(quota), int(period)


def _quota_v1(cgroup: Path) -> tuple[int, int]:
    return int((cgroup / "cpu/cpu.cfs_quota_us").read_text()), int((cgroup / "cpu/cpu.cfs_period_us").read_text())
