"""Counters that are passed on in the background, once a second.

TorchServe writes a line of log for each number that it is given, and its frontend parses it. That is nothing that the answer to
a photo should wait for.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import Protocol


class PassOn(Protocol):
    def __call__(self, name: str, value: float, **labels: str) -> None:
        """Add a value that is above 0 to a counter."""
        ...


class Counters:
    def __init__(self, pass_on: PassOn, *, seconds: float = 1.0) -> None:
        """seconds: after which what is added here is passed on."""
        self._pass_on = pass_on
        self._seconds = seconds
        self._sums: defaultdict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(int)
        self._lock = threading.Lock()
        self._changed = threading.Event()
        threading.Thread(target=self._keep_flushing, name="counters", daemon=True).start()

    def add(self, name: str, value: float, **labels: str) -> None:
        with self._lock:
            self._sums[name, tuple(labels.items())] += value
        self._changed.set()

    def flush(self) -> None:
        """Pass on what has been added since the last time."""
        with self._lock:
            sums, self._sums = self._sums, defaultdict(int)
        for (name, labels), value in sums.items():
            self._pass_on(name, value, **dict(labels))

    def _keep_flushing(self) -> None:
        while True:
            self._changed.wait()
            time.sleep(self._seconds)
            self._changed.clear()
            self.flush()
