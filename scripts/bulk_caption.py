"""Caption many photos with Ray Data, on this machine or on a cluster: `python -m scripts.bulk_caption --help`.

    OUTPUT/_job.json            model, parameters and form of the results
    OUTPUT/captions-KEY.parquet one row a photo, also for those that could not be read

Photos go through in shards. A worker writes the results of a shard whole or not at all, into a file whose name follows
from the photos in it: a shard that is done again, because its worker was killed, replaces itself. What stands in the
files already is not done again, so an interrupted job, or one with new photos, goes on when it is started again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet
import ray
import ray.data
import torch
from tqdm import tqdm

from handler.captioner import PreparedImage, load_captioner
from handler.checkpoint import read_manifest
from handler.config import DecodingConfig, ServingConfig
from handler.errors import CaptionError, InvalidImage
from handler.machine import available_cpus
from handler.parameters import Parameters, describe, parse_parameters
from scripts.caption import BATCH, ROOT, SUFFIXES
from scripts.export import export

SHARD = 128
"""Photos that are done again when a worker dies; also the rows of a file."""
DECODING_SECONDS = 60.0
"""For one photo. Nobody waits for the answer: one that is slow to decode on a busy machine need not be given up so soon."""
JOB = "_job.json"
"""Readers of Parquet folders pass over names with an underscore."""
IMAGE_COLUMNS = ("image", "bytes", "image_bytes")
SCHEMA = pa.schema(
    {
        "image": pa.string(),  # the path or URI, or FILE#ROW of a Parquet file
        "caption": pa.string(),  # the best; null where there is none
        "confidence": pa.float32(),
        "captions": pa.list_(pa.struct({"caption": pa.string(), "confidence": pa.float32(), "log_likelihood": pa.float32()})),
        "width": pa.int32(),
        "height": pa.int32(),
        "format": pa.string(),
        "error": pa.string(),  # code of the error; null where the photo could be read
        "message": pa.string(),
    }
)


class JobError(Exception):
    """The job cannot be done as it was asked for. The message says what to do."""


@dataclass(frozen=True)
class Photo:
    name: str
    """Under which it stands in the results."""
    file: str
    """Path or URI of the image, or of the Parquet file that holds it."""
    row: int | None = None


@dataclass(frozen=True)
class Store:
    """A folder here or in a bucket (`s3://…`, `gs://…`), whichever its URI says."""

    uri: str

    def __post_init__(self) -> None:
        self._resolved()  # so that a mistake shows at once

    def path(self, name: str) -> str:
        return f"{self._resolved()[1]}/{name}"

    @property
    def filesystem(self) -> pa.fs.FileSystem:
        return self._resolved()[0]

    def names(self) -> list[str]:
        filesystem, path = self._resolved()
        return sorted(info.base_name for info in filesystem.get_file_info(pa.fs.FileSelector(path, allow_not_found=True)))

    def read(self, name: str) -> bytes:
        with self.filesystem.open_input_stream(self.path(name)) as stream:
            return bytes(stream.read())

    def write(self, name: str, content: bytes) -> None:
        """All of it or nothing: a bucket does so by itself, a folder needs a second name."""
        filesystem, path = self._resolved()
        filesystem.create_dir(path, recursive=True)
        local = isinstance(filesystem, pa.fs.LocalFileSystem)
        target = self.path(f".{name}.{os.getpid()}.part" if local else name)
        with filesystem.open_output_stream(target) as stream:
            stream.write(content)
        if local:
            filesystem.move(target, self.path(name))

    def _resolved(self) -> tuple[pa.fs.FileSystem, str]:
        return _resolved(self.uri)


class ShardCaptioner:
    """Captions a shard and writes its results; Ray makes one in each worker and calls it for each shard."""

    def __init__(
        self, checkpoint: str, parameters: dict[str, Any], output: str, form: str, threads: int, engine: str | None = None
    ) -> None:
        """engine: where this machine has the exported encoder; None: this worker makes one for itself."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        environment = {"CAPTION_ENGINE": os.environ.get("CAPTION_ENGINE", "")}  # CAPTION_THREADS is for the service
        serving = ServingConfig(threads=threads, decoding=DecodingConfig(seconds=DECODING_SECONDS))
        with tempfile.TemporaryDirectory() as folder:
            if not engine and device == "cpu":
                export(Path(checkpoint), Path(folder))
            exported = Path(engine or folder)
            self.captioner = load_captioner(Path(checkpoint), exported, serving, device=device, environment=environment)
        self.parameters = Parameters(**parameters)
        self.store = Store(output)
        self.form = form

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        photos = [Photo(**photo) for photo in json.loads(shard["photos"])]
        rows: list[dict[str, Any]] = []
        images = _images(photos)
        for start in range(0, len(photos), BATCH):
            chunk = photos[start : start + BATCH]
            rows += self._caption([photo.name for photo in chunk], [next(images) for _ in chunk])
        self.store.write(shard["name"], _encoded(rows, self.form))
        return {"photos": len(rows), "failed": sum(row["error"] is not None for row in rows)}

    def _caption(self, names: Sequence[str], images: Sequence[bytes | InvalidImage]) -> list[dict[str, Any]]:
        prepared = [self._prepare(image) for image in images]
        good = [image for image in prepared if isinstance(image, PreparedImage)]
        captioned = iter(self.captioner.caption(good, [self.parameters] * len(good)))
        rows: list[dict[str, Any]] = []
        for name, image in zip(names, prepared, strict=True):
            row: dict[str, Any] = dict.fromkeys(SCHEMA.names) | {"image": name}
            if isinstance(image, CaptionError):
                rows.append(row | {"error": image.code, "message": image.message})
                continue
            captions = [
                {"caption": c.caption, "confidence": c.confidence, "log_likelihood": c.log_likelihood}
                for c in next(captioned).captions
            ]
            best = captions[0] if captions else {"caption": None, "confidence": None}
            about = {"width": image.width, "height": image.height, "format": image.format, "captions": captions}
            rows.append(row | about | {key: best[key] for key in ("caption", "confidence")})
        return rows

    def _prepare(self, image: bytes | InvalidImage) -> PreparedImage | CaptionError:
        if isinstance(image, CaptionError):
            return image
        try:
            return self.captioner.prepare(image)
        except CaptionError as error:
            return error


def find_photos(source: str) -> list[Photo]:
    """The photos of a folder (and below), of a Parquet file or a folder of them, or of a list (.txt, one path a line).

    Raises JobError.
    """
    filesystem, path = _resolved(source)
    info = filesystem.get_file_info(path)
    if info.type == pa.fs.FileType.NotFound:
        raise JobError(f"{source} does not exist")
    prefix = source[: len(source) - len(path)] if source.endswith(path) else ""
    if info.type == pa.fs.FileType.File:
        files = [path]
    else:
        found = filesystem.get_file_info(pa.fs.FileSelector(path, recursive=True))
        files = sorted(f.path for f in found if f.type == pa.fs.FileType.File)
    if info.type == pa.fs.FileType.File and path.endswith(".txt"):
        with filesystem.open_input_stream(path) as stream:
            lines = stream.read().decode().splitlines()
        photos = [Photo(line.strip(), line.strip()) for line in lines if line.strip()]
    elif tables := [file for file in files if file.endswith(".parquet")]:
        photos = [photo for file in tables for photo in _rows(prefix + file)]
    else:
        photos = [Photo(prefix + file, prefix + file) for file in files if Path(file).suffix.lower() in SUFFIXES]
    photos = list({photo.name: photo for photo in photos}.values())
    if not photos:
        raise JobError(f"there are no photos in {source}")
    return photos


def shards_of(photos: Sequence[Photo], form: str, size: int = SHARD) -> Iterator[dict[str, str]]:
    """The photos in shards of `size` at most, each from files of one kind, with the name of its results."""
    for _, group in groupby(photos, key=lambda photo: None if photo.row is None else photo.file):
        members = list(group)
        for start in range(0, len(members), size):
            shard = members[start : start + size]
            key = hashlib.sha256("\n".join(photo.name for photo in shard).encode()).hexdigest()[:16]
            yield {"name": f"captions-{key}.{form}", "photos": json.dumps([vars(photo) for photo in shard])}


def finished(store: Store) -> set[str]:
    """The names of the photos whose results are there."""
    names: set[str] = set()
    for name in store.names():
        if name.startswith("captions-") and name.endswith(".parquet"):
            names.update(pa.parquet.read_table(io.BytesIO(store.read(name)), columns=["image"])["image"].to_pylist())
        elif name.startswith("captions-"):
            names.update(json.loads(line)["image"] for line in store.read(name).splitlines())
    return names


def check_job(store: Store, job: dict[str, Any]) -> None:
    """Note what the results are made with, or make sure that they always were. Raises JobError."""
    if JOB not in store.names():
        if finished(store):
            raise JobError(f"{store.uri} has results, but no {JOB}: choose another folder")
        store.write(JOB, json.dumps(job, indent=2).encode())
        return
    before = json.loads(store.read(JOB))
    changed = [key for key in job if before.get(key) != job[key]]
    if changed:
        raise JobError(f"{store.uri} has results of another job, with another {', '.join(changed)}: choose another folder")


def caption_shards(
    shards: Sequence[dict[str, str]], bar: tqdm[Any], *, worker: dict[str, Any], workers: int, threads: int
) -> int:
    """Caption the shards on the Ray cluster that is connected to. Gives the number of photos that could not be read.

    worker: the arguments of ShardCaptioner.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    results = ray.data.from_items(list(shards), override_num_blocks=len(shards)).map(
        ShardCaptioner,  # type: ignore[arg-type]  # a class that Ray calls in each worker
        fn_constructor_kwargs=worker | {"threads": threads},
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(shards)), max_tasks_in_flight_per_actor=2),
        num_cpus=threads,
        num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
    )
    failed = 0
    for shard in results.iter_rows():
        failed += shard["failed"]
        bar.set_postfix(unreadable=failed, refresh=False)
        bar.update(shard["photos"])
    return failed


def _images(photos: Sequence[Photo]) -> Iterator[bytes | InvalidImage]:
    """The files' bytes, in order; those of a Parquet file are read together."""
    if photos[0].row is not None:
        filesystem, path = _resolved(photos[0].file)
        table = pa.dataset.dataset(path, filesystem=filesystem)
        column = _image_column(table.schema, photos[0].file)
        for value in table.take([photo.row for photo in photos], columns=[column])[column].to_pylist():
            content = value.get("bytes") if isinstance(value, dict) else value
            yield content if content else InvalidImage("the row has no image")
        return
    for photo in photos:
        try:
            filesystem, path = _resolved(photo.file)
            with filesystem.open_input_stream(path) as stream:
                yield bytes(stream.read())
        except OSError as error:
            yield InvalidImage(f"the file cannot be read: {error}")


def _rows(file: str) -> list[Photo]:
    filesystem, path = _resolved(file)
    try:
        table = pa.parquet.ParquetFile(path, filesystem=filesystem)
    except pa.ArrowInvalid as error:
        raise JobError(f"{file} is not a whole Parquet file: {error}") from None
    with table:
        _image_column(table.schema_arrow, file)
        return [Photo(f"{file}#{row}", file, row) for row in range(table.metadata.num_rows)]


def _image_column(schema: pa.Schema, file: str) -> str:
    """The column with the images: bytes, or Hugging Face's `{"bytes": …, "path": …}`."""
    found = [name for name in IMAGE_COLUMNS if name in schema.names]
    if not found:
        raise JobError(f"{file} has no column {' or '.join(IMAGE_COLUMNS)} with the bytes of images: {schema.names}")
    return found[0]


def _encoded(rows: list[dict[str, Any]], form: str) -> bytes:
    if form == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows, SCHEMA), buffer)
    return buffer.getvalue()


def _resolved(uri: str) -> tuple[pa.fs.FileSystem, str]:
    if "://" in uri:
        filesystem, path = pa.fs.FileSystem.from_uri(uri)
        return filesystem, path.rstrip("/")
    return pa.fs.LocalFileSystem(), str(Path(uri).absolute())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", help="folder, Parquet file(s) with a column `image`, or .txt with a path a line; or a URI of one"
    )
    parser.add_argument("output", help="folder of the results, or its URI")
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "weights/en", help="default: the embedded English model")
    parser.add_argument("--workers", type=int, help="default: as many as the cores are enough for, or as there are GPUs")
    parser.add_argument("--threads", type=int, default=1, help="cores for each worker; default: 1, which loses least")
    parser.add_argument("--shard", type=int, default=SHARD, help="photos in a file of results; default: %(default)s")
    parser.add_argument("--address", help="of a Ray cluster, or `auto`; default: this machine")
    for name, field in Parameters.model_fields.items():
        kind = str if name == "language" else float if "float" in str(field.annotation) else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=field.description)
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint.absolute()
    try:
        manifest = read_manifest(checkpoint)
        given = {name: getattr(arguments, name) for name in describe(manifest.config)}
        parameters = parse_parameters(
            {"num_captions": 1} | {k: v for k, v in given.items() if v is not None}, manifest.config
        ).model_dump()
        photos = find_photos(arguments.source)
        store = Store(arguments.output)
        check_job(store, {"model": manifest.digest, "parameters": parameters, "format": arguments.format})
    except (CaptionError, JobError, OSError, pa.ArrowInvalid) as error:
        parser.error(str(error))
    done = finished(store)
    remaining = [photo for photo in photos if photo.name not in done]
    worker: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "parameters": parameters,
        "output": store.uri,
        "form": arguments.format,
    }
    failed = 0
    if remaining:
        for name in ("ray", "ray.data", "ray._private"):
            logging.getLogger(name).setLevel(logging.ERROR)  # the bar below says what there is to say
        if arguments.address:
            ray.init(address=arguments.address, logging_level=logging.ERROR)
        else:
            cores = arguments.workers * arguments.threads if arguments.workers else max(available_cpus(), arguments.threads)
            ray.init(num_cpus=cores, include_dashboard=False, logging_level=logging.ERROR)
        resources = ray.cluster_resources()
        workers = arguments.workers or int(resources.get("GPU") or resources["CPU"] // arguments.threads) or 1
        shards = list(shards_of(remaining, arguments.format, arguments.shard))
        start, interval = len(photos) - len(remaining), 0.5 if sys.stderr.isatty() else 10
        with (
            tempfile.TemporaryDirectory() as folder,
            tqdm(total=len(photos), initial=start, unit="photo", mininterval=interval) as bar,
        ):
            if not (arguments.address or resources.get("GPU")):
                # Once for all workers, and for those that replace a killed one.
                export(checkpoint, Path(folder))
                worker["engine"] = folder
            failed = caption_shards(shards, bar, worker=worker, workers=workers, threads=arguments.threads)
    print(
        f"{len(photos)} photos are in {arguments.output}, {len(remaining)} of them new; "
        f"{failed} of the new ones could not be read: their column `error` says why"
    )


if __name__ == "__main__":
    main()
