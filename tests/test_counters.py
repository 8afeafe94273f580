"""Nothing that is counted is lost or counted twice, and it is passed on without being asked for."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from handler.counters import Counters


class Passed:
    def __init__(self) -> None:
        self.on: list[tuple[str, float, dict[str, str]]] = []

    def __call__(self, name: str, value: float, **labels: str) -> None:
        self.on.append((name, value, labels))


def test_added_up_by_name_and_labels() -> None:
    passed = Passed()
    counters = Counters(passed, seconds=60)
    counters.add("Captions", 5)
    counters.add("Captions", 2)
    counters.add("EncodeMilliseconds", 1.5)
    for code in ("InvalidImage", "MissingImage", "InvalidImage"):
        counters.add("CaptionErrors", 1, code=code)
    counters.flush()
    counters.flush()
    assert passed.on == [
        ("Captions", 7, {}),
        ("EncodeMilliseconds", 1.5, {}),
        ("CaptionErrors", 2, {"code": "InvalidImage"}),
        ("CaptionErrors", 1, {"code": "MissingImage"}),
    ]


def test_passed_on_in_the_background_and_neither_lost_nor_counted_twice() -> None:
    passed = Passed()
    counters = Counters(passed, seconds=0.001)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2000):
            pool.submit(counters.add, "Captions", 1)
    deadline = time.monotonic() + 30
    while sum(value for _, value, _ in passed.on) < 2000 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sum(value for _, value, _ in passed.on) == 2000
    assert len(passed.on) < 2000
