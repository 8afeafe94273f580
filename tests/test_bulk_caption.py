"""Captions in bulk: every photo exactly once, whatever is wrong with it and whoever dies."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from handler.checkpoint import Checkpoint, save_checkpoint
from tests.conftest import ROOT, SAMPLES

if importlib.util.find_spec("ray") is None and os.environ.get("CI") != "true":
    pytest.skip("Ray is missing: pip install -r requirements/bulk.txt", allow_module_level=True)

import pyarrow as pa
import pyarrow.parquet as pq

from scripts import bulk_caption
from scripts.bulk_caption import JobError, ShardCaptioner, Store, check_job, find_photos, finished, shards_of

PHOTOS, SHARD = 1000, 25
BROKEN = (b"no image", b"", b"\xff\xd8\xff\xe0" + bytes(100), None)
"""What a broken photo holds; None: half of a photo."""
BAD = {number: BROKEN[number % 4] for number in range(7, PHOTOS, 25)}


@pytest.fixture(scope="module")
def saved(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bulk") / "checkpoint"
    parts = {"vocabulary": checkpoint.vocabulary, "encoder": checkpoint.encoder, "decoder": checkpoint.decoder}
    save_checkpoint(directory, config=checkpoint.config, **parts)  # type: ignore[arg-type]
    return directory


def write_photos(folder: Path, count: int) -> Path:
    """Small photos in two folders, pieces of the samples, some of them broken."""
    samples = [Image.open(path).convert("RGB").resize((192, 144)) for path in SAMPLES]
    for number in range(count):
        path = folder / ("even" if number % 2 == 0 else "odd") / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        x, y = number % 32, number // 32
        samples[number % len(samples)].crop((x, y, x + 160, y + 112)).save(path)
        if number in BAD:
            broken = BAD[number]
            path.write_bytes(path.read_bytes()[:1500] if broken is None else broken)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", 48)


def arguments(saved: Path, source: object, output: Path) -> list[str]:
    return [str(source), str(output), "--checkpoint", str(saved), "--workers", "2", "--shard", str(SHARD), "--beam-size", "2"]


def run(saved: Path, source: object, output: Path, *more: str) -> str:
    command = [sys.executable, "-m", "scripts.bulk_caption", *arguments(saved, source, output), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(output: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(output).to_pylist())


@pytest.mark.slow
def test_each_photo_once_though_a_worker_is_killed_and_the_job_is_started_again(saved: Path, tmp_path: Path) -> None:
    folder, output = write_photos(tmp_path / "photos", PHOTOS), tmp_path / "captions"
    command = [sys.executable, "-m", "scripts.bulk_caption", *arguments(saved, folder, output)]
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 500
        while not list(output.glob("*.parquet")):
            assert job.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        worker = next(p for p in psutil.Process(job.pid).children(recursive=True) if "MapWorker" in " ".join(p.cmdline()))
        worker.kill()
        finished_before = len(list(output.glob("*.parquet")))
        assert finished_before < PHOTOS // SHARD, "the job was over: nobody was killed at work"
        assert job.wait(500) == 0, (tmp_path / "log").read_text()
    finally:
        job.kill()
        job.wait()
    found = rows(output)
    files = sorted(str(path) for path in folder.rglob("*.jpg"))
    assert len(files) == PHOTOS
    assert sorted(row["image"] for row in found) == files
    broken = {row["image"]: row["error"] for row in found if row["error"] is not None}
    assert {int(Path(name).stem) for name in broken} == set(BAD)
    assert set(broken.values()) == {"InvalidImage"}
    for row in found:
        assert (row["caption"] is None) == (row["error"] is not None)
        if row["error"] is None:
            assert row["caption"] == row["captions"][0]["caption"]
            assert (row["width"], row["height"], row["format"]) == (160, 112, "JPEG")
    assert not [path for path in output.iterdir() if path.name.endswith(".part")]

    # Started again there is nothing to do. A lost file and a new photo are, and the rest stays as it is.
    assert "0 of them new" in run(saved, folder, output)
    lost, *others = sorted(output.glob("*.parquet"))
    times = {path: path.stat().st_mtime_ns for path in others}
    lost.unlink()
    Image.new("RGB", (50, 50)).save(folder / "added.png")
    assert f"{SHARD + 1} of them new" in run(saved, folder, output)
    assert Counter(row["image"] for row in rows(output)) == Counter([*files, str(folder / "added.png")])
    assert {path: path.stat().st_mtime_ns for path in others} == times


def test_photos_in_parquet_files_and_lists(folder: Path, tmp_path: Path) -> None:
    files = sorted(folder.rglob("*.jpg"))
    table = pa.table({"image": [{"bytes": path.read_bytes(), "path": path.name} for path in files]})
    pq.write_table(table, tmp_path / "photos.parquet", row_group_size=7)
    (tmp_path / "list.txt").write_text("\n".join([*map(str, files), "/nowhere.jpg", str(files[0])]) + "\n\n")
    assert [photo.name for photo in find_photos(str(folder))] == [str(path) for path in files]
    assert [photo.name for photo in find_photos(folder.as_uri())] == [path.as_uri() for path in files]
    assert [photo.name for photo in find_photos(str(tmp_path / "list.txt"))] == [*map(str, files), "/nowhere.jpg"]
    rows_of = find_photos(str(tmp_path / "photos.parquet"))
    assert [photo.row for photo in rows_of] == list(range(48))
    read = list(bulk_caption._images(rows_of[5:9]))
    assert read == [path.read_bytes() for path in files[5:9]]


def test_a_shard_is_captioned_as_the_service_would(saved: Path, folder: Path, tmp_path: Path) -> None:
    """In this process and without Ray: its rows are in order, and a file that is missing is one of them."""
    photos = [*find_photos(str(folder))[:2], bulk_caption.Photo("/nowhere.jpg", "/nowhere.jpg")]
    (shard,) = shards_of(photos, "jsonl")
    captioner = ShardCaptioner(str(saved), {"beam_size": 2, "num_captions": 2}, str(tmp_path / "out"), "jsonl", 1)
    assert captioner.captioner.engine.name.startswith("openvino")
    assert captioner(shard) == {"photos": 3, "failed": 1}
    store = Store(str(tmp_path / "out"))
    (name,) = store.names()
    written = [json.loads(line) for line in store.read(name).splitlines()]
    assert [row["image"] for row in written] == [photo.name for photo in photos]
    assert written[2]["error"] == "InvalidImage"
    assert "cannot be read" in written[2]["message"]
    assert finished(store) == {photo.name for photo in photos}


def test_results_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    job = {"model": "sha256:1", "parameters": {"beam_size": 5}, "format": "parquet"}
    check_job(store, job)
    check_job(store, job)
    with pytest.raises(JobError, match="another model"):
        check_job(store, job | {"model": "sha256:2"})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("missing", None, "does not exist"), ("a.txt", "", "no photos"), ("a.parquet", "x", "not a whole Parquet file")],
)
def test_what_is_no_source_is_said(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(JobError, match=said):
        find_photos(str(tmp_path / name))


def test_a_table_without_images_is_said(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(JobError, match="no column image"):
        find_photos(str(tmp_path))
