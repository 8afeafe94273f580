"""Minutes of mixed traffic while versions are rolled and workers are scaled: no lost request, and nothing that grows.

`SOAK_SECONDS=1800 pytest tests/test_soak.py` for half an hour of it.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from handler.checkpoint import Checkpoint, save_checkpoint
from scripts import scorecard
from scripts.models import Management
from scripts.package_mar import package
from scripts.scorecard import MIB, Service
from scripts.server import TorchServe, free_settings
from tests import corpus
from tests.conftest import ROOT, SAMPLES

SECONDS = float(os.environ.get("SOAK_SECONDS", "180"))
pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(SECONDS + 600)]

CLIENTS = 4
GROWTH_MIB = 120
"""Of all workers together; allocators keep what they have had once, and each restart of a version begins anew."""


@pytest.fixture
def service(tmp_path: Path, checkpoint: Checkpoint) -> Iterator[tuple[Service, Management]]:
    """A service whose model store holds versions 1.0 and 2.0, and a client of its management API."""
    parts = {"vocabulary": checkpoint.vocabulary, "encoder": checkpoint.encoder, "decoder": checkpoint.decoder}
    for version in ("1.0", "2.0"):
        config = checkpoint.config.model_copy(update={"version": version})
        save_checkpoint(tmp_path / version, config=config, **parts)  # type: ignore[arg-type]
        archive = tmp_path / f"store/caption-{version}.mar"
        package(tmp_path / version, archive, name="caption", model_config=ROOT / "deploy/torchserve/model-config.yaml")
    settings = {"model_store": str(tmp_path / "store"), "load_models": "caption=caption-1.0.mar", "enable_model_api": "true"}
    with TorchServe(free_settings() | settings) as running:
        running.wait_until_ready()
        management = running.address("management")
        yield Service(running.address("inference"), management), Management(management)


def roll(management: Management, old: str, new: str, archive: str) -> None:
    """Register the new version beside the old one, send requests to it, then take the old one away."""
    management.register(archive, "caption")
    management.set_default("caption", new)
    management.unregister("caption", old, settle=1)  # requests that have reached the old version's queue


def test_mixed_traffic_through_updates_and_scaling_loses_nothing_and_leaves_nothing(
    service: tuple[Service, Management],
) -> None:
    running, management = service
    good = [corpus.RequestCase(p.stem, p.read_bytes(), corpus.GOOD) for p in SAMPLES]
    bad = [corpus.RequestCase(c.name, c.data, c.statuses) for c in corpus.images()[::25]]
    # four photos, then something of the corpus
    cycle = itertools.cycle(case for one, odd in zip(itertools.cycle(good), bad, strict=False) for case in (one, one, odd))
    lock, over = threading.Lock(), threading.Event()
    answers: Counter[int] = Counter()
    wrong: list[str] = []

    def client() -> None:
        while not over.is_set():
            with lock:
                case = next(cycle)
            answer = running.send(case)
            with lock:
                answers[answer.status] += 1
                if answer.status not in case.statuses:
                    wrong.append(f"{case.name}: {answer.status}")

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client) for _ in range(CLIENTS)]
        try:
            end = time.monotonic() + SECONDS
            management.scale("caption", 1)  # as it will be in the end
            time.sleep(min(30, SECONDS / 4))  # caches fill
            memory, files = running.memory(), scorecard.temporary_files(running)
            descriptors = scorecard.open_files(running)
            versions = itertools.cycle([("1.0", "2.0", "caption-2.0.mar"), ("2.0", "1.0", "caption-1.0.mar")])
            rolled = 0
            while time.monotonic() < end or rolled % 2:
                roll(management, *next(versions))
                rolled += 1
                for workers in (2, 1):
                    management.scale("caption", workers)
                    time.sleep(2)
        finally:
            over.set()
        for one in clients:
            one.result()
    grown = {name: (used - memory[name]) / MIB for name, used in running.memory().items()}
    more = scorecard.open_files(running) - descriptors
    left = {p for p in scorecard.temporary_files(running) - files if p.is_file()}
    print(f"soak: {sum(answers.values())} requests {dict(answers)}, {rolled} updates, MiB more: {grown}, descriptors {more}")
    assert wrong == []
    assert rolled >= 2
    assert grown["workers"] < GROWTH_MIB
    assert grown["frontend"] < 500  # Java's heap grows to its limit before it is collected
    assert more <= 8
    # each registration unpacks the archive anew; what the registrations before it left is TorchServe's to remove
    assert [path for path in left if "models" not in path.parts] == []
