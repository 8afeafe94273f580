"""Photos with captions: COCO, Karpathy, Flickr and CSV files as one list of examples, checked before anything is computed."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from handler.config import ImageLimits
from handler.errors import CaptionError
from handler.image import decode

KARPATHY_SPLITS = {"restval": "train", "val": "dev"}
"""Karpathy's names for what is called train and dev here; his `restval` is meant to be trained on."""


class DatasetError(CaptionError):
    """The files of a dataset cannot be read as such, or nothing usable is left of them."""

    code = "InvalidDataset"


@dataclass(frozen=True)
class Example:
    """A photo and what people wrote about it."""

    path: Path
    captions: tuple[str, ...]
    split: str = "train"


@dataclass(frozen=True)
class Problem:
    """Why an example, or one of its captions, is left out."""

    path: Path
    reason: str


def load_dataset(
    images: Path,
    captions: Mapping[str, Path],
    *,
    splits: Mapping[str, Path] | None = None,
    dev_share: float = 0.1,
) -> list[Example]:
    """Read every example of one or several caption files, whose form is recognised from their content.

    images: the folder that file names are relative to.
    captions: files by split; under the name "" a file that knows its splits itself, or is divided by `splits`.
    splits: lists of file names, one a line, as Flickr8k and Flickr30k have them; photos in none of them are left out.
    dev_share: of a file without any splits, this share of the photos becomes the split `dev`, chosen by the photo's name.

    Raises DatasetError.
    """
    if not images.is_dir():
        raise DatasetError(f"{images} is not a folder of photos")
    examples = []
    for split, path in captions.items():
        for name, texts, own_split in _records(path):
            examples.append(Example(images / name, tuple(texts), split or own_split))
    if splits:
        split_of = {name: split for split, path in splits.items() for name in _read(path).split()}
        examples = [Example(e.path, e.captions, split_of.get(str(e.path.relative_to(images)), "")) for e in examples]
        examples = [e for e in examples if e.split]
    elif not any(e.split for e in examples):
        examples = [Example(e.path, e.captions, "dev" if _share(e.path.name) < dev_share else "train") for e in examples]
    if not examples:
        raise DatasetError(f"no photo with captions in {', '.join(map(str, captions.values()))}")
    return examples


def check(examples: Sequence[Example], *, decode_photos: bool = True) -> tuple[list[Example], list[Problem]]:
    """The usable examples, and what is wrong with the others: photos missing or not decodable, captions empty.

    An empty caption is dropped alone as long as its photo has another one.
    """
    problems: list[Problem] = []
    usable: list[Example] = []
    with ThreadPoolExecutor() as pool:
        verdicts = pool.map(lambda e: _unusable(e.path, decode_photos), examples)
        for example, reason in zip(examples, tqdm(verdicts, "checking", len(examples), unit="photo"), strict=True):
            texts = tuple(text for text in example.captions if text.strip())
            if len(texts) < len(example.captions) or not texts:
                problems.append(Problem(example.path, "an empty caption" if texts else "no caption"))
            if reason:
                problems.append(Problem(example.path, reason))
            elif texts:
                usable.append(Example(example.path, texts, example.split))
    return usable, problems


def summary(problems: Sequence[Problem], *, shown: int = 10) -> str:
    """The problems counted by reason, and the first of them by name."""
    counts = Counter(problem.reason.split(":")[0] for problem in problems)
    lines = [f"{n} × {reason}" for reason, n in counts.most_common()]
    lines += [f"  {problem.path}: {problem.reason}" for problem in problems[:shown]]
    return "\n".join(lines + [f"  … and {len(problems) - shown} more"] * (len(problems) > shown))


def of_split(examples: Sequence[Example], split: str) -> list[Example]:
    """Raises DatasetError when the split is empty."""
    chosen = [e for e in examples if e.split == split]
    if not chosen:
        raise DatasetError(f"no photo is in the split {split!r}; there are {dict(Counter(e.split for e in examples))}")
    return chosen


Record = tuple[str, list[str], str]
"""A photo's file name, its captions, its split or ""."""


def _records(path: Path) -> Iterator[Record]:
    if path.suffix.lower() == ".csv":
        return _csv(path)
    if path.suffix.lower() != ".json":
        return _flickr(path)
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise DatasetError(f"{path} is not JSON: {error}") from error
    reader: Callable[[dict[str, Any]], Iterator[Record]] = _coco if "annotations" in content else _karpathy
    try:
        return iter(list(reader(content)))
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{path} is neither a COCO nor a Karpathy file: {error} is missing") from error


def _coco(content: dict[str, Any]) -> Iterator[Record]:
    """`captions_train2014.json`: images with id and file name, annotations with image id and caption."""
    texts: dict[Any, list[str]] = defaultdict(list)
    for annotation in content["annotations"]:
        texts[annotation["image_id"]].append(annotation["caption"])
    for image in content["images"]:
        yield image["file_name"], texts[image["id"]], ""


def _karpathy(content: dict[str, Any]) -> Iterator[Record]:
    """`dataset_coco.json`, `dataset_flickr8k.json`: images with their sentences and split."""
    for image in content["images"]:
        name = f"{image['filepath']}/{image['filename']}" if "filepath" in image else image["filename"]
        yield name, [sentence["raw"] for sentence in image["sentences"]], KARPATHY_SPLITS.get(image["split"], image["split"])


def _flickr(path: Path) -> Iterator[Record]:
    """Lines `name.jpg#k<TAB>caption`."""
    texts: dict[str, list[str]] = defaultdict(list)
    for number, line in enumerate(_read(path).splitlines(), 1):
        key, tab, text = line.partition("\t")
        if line.strip() and not tab:
            raise DatasetError(f"{path}, line {number}: expected name.jpg#number, a tab and a caption, found {line[:60]!r}")
        if tab:
            texts[key.rpartition("#")[0] or key].append(text.strip())
    return ((name, captions, "") for name, captions in texts.items())


def _csv(path: Path) -> Iterator[Record]:
    """Columns `image`, `caption` and perhaps `split`; a photo may have several lines."""
    rows = csv.DictReader(_read(path).splitlines())
    if not {"image", "caption"} <= set(rows.fieldnames or ()):
        raise DatasetError(f"{path} needs the columns image and caption, it has {rows.fieldnames}")
    texts: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        texts[row["image"], row.get("split") or ""].append(row["caption"] or "")
    return ((name, captions, split) for (name, split), captions in texts.items())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error


def _unusable(path: Path, decode_photos: bool) -> str | None:
    if not path.is_file():
        return "missing"
    if decode_photos:
        try:
            decode(path.read_bytes(), ImageLimits(), smallest_side=64)
        except (CaptionError, OSError) as error:
            return f"unreadable: {error}"
    return None


def _share(name: str) -> float:
    """A number in 0..1 that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """The options by which every command here is told its data; read by `dataset_from`."""
    parser.add_argument("--images", type=Path, required=True, help="folder of photos")
    parser.add_argument(
        "--captions",
        type=_named_path,
        action="append",
        required=True,
        metavar="[SPLIT=]FILE",
        help="COCO or Karpathy JSON, CSV with columns image,caption[,split], or Flickr token file; may be repeated",
    )
    parser.add_argument(
        "--split", type=_named_path, action="append", default=[], metavar="NAME=FILE", help="list of a split's photos"
    )
    parser.add_argument("--strict", action="store_true", help="end when any photo or caption is unusable")


def dataset_from(arguments: argparse.Namespace) -> list[Example]:
    """The usable examples; what is left out is printed. Raises DatasetError."""
    captions, splits = dict(arguments.captions), dict(arguments.split)
    examples, problems = check(load_dataset(arguments.images, captions, splits=splits))
    if problems:
        print(f"{len(problems)} problems in the data:\n{summary(problems)}")
        if arguments.strict or not examples:
            raise DatasetError("the data has problems" if examples else "no usable photo is left")
    print("photos: " + ", ".join(f"{n} {split}" for split, n in Counter(e.split for e in examples).items()))
    return examples


def _named_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    return (name, Path(path)) if equals else ("", Path(text))
