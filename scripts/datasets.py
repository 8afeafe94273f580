"""Photos with captions."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """A photo and what people wrote about it."""

    path: Path
    captions: tuple[str, ...]


def load_flickr(images: Path, captions: Path, split: Path) -> list[Example]:
    """The photos that `split` names, with their lines `name.jpg#k<TAB>caption` of `captions`."""
    texts: dict[str, list[str]] = defaultdict(list)
    for line in captions.read_text(encoding="utf-8").splitlines():
        key, _, text = line.partition("\t")
        texts[key.split("#")[0]].append(text.strip())
    names = split.read_text(encoding="utf-8").split()
    return [Example(images / name, tuple(texts[name])) for name in names]
