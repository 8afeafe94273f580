"""What Chainer itself answered, kept so that the tests can compare with it where Chainer is not installed.

golden/CASE/case.json           a model, by the seed of its weights, and what is asked of it; written by hand
golden/CASE/features.npy        (photos, 2048)
golden/CASE/probabilities.npy   (words, V): of each next word, the words given one after the other on the first photo
golden/CASE/captions.json       every caption that each search finds, best first

`python -m tests.chainer.golden` computes all but the cases anew, with Chainer.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.chainer import environment
from tests.chainer.models import vocabulary_of

GOLDEN = Path(__file__).with_name("golden")
NAMES = tuple(sorted(folder.name for folder in GOLDEN.iterdir()))
ANSWERS = ("features.npy", "probabilities.npy", "captions.json")

REAL_VOCABULARIES = Path(os.environ.get("CHAINER_CAPTION_DATA", environment.ROOT.parent / "shared/data/chainer-caption"))
"""chainer-caption's folder `data/MSCOCO`. Its vocabularies are not ours to distribute."""
REAL = {"words": "mscoco_caption_train2014_processed_dic.json", "characters": "yjcaptions26k_clean_processed_dic.json"}
"""The vocabularies whose sizes and special tokens two of the cases have."""


def _character(index: int) -> str:
    return chr((0x3041 if index < 80 else 0x4E00) + index)  # kana, then Han


MADE_UP = {"words": "word{}".format, "characters": _character, "languages": "ことば{}".format}


@dataclass(frozen=True)
class Answers:
    """A case and Chainer's answers to it."""

    case: dict[str, Any]
    features: np.ndarray
    probabilities: np.ndarray
    captions: list[dict[str, Any]]

    @property
    def vocabulary(self) -> dict[str, int]:
        """The real one where it lies, else made-up words. What Chainer answers does not depend on it."""
        name = self.case["name"]
        real = REAL_VOCABULARIES / REAL.get(name, "none")
        if real.is_file():
            return json.loads(real.read_text(encoding="utf-8"))
        return vocabulary_of(self.case["special"], self.case["vocabulary_size"], MADE_UP[name])

    def best(self, photo: str, start: str, *, beam: int, depth: int = 50) -> list[dict[str, Any]]:
        """`path` and `log_likelihood` of every caption that one search found."""
        asked = {"photo": photo, "start": start, "beam": beam, "depth": depth}
        (answer,) = (answer for answer in self.captions if answer.items() >= asked.items())
        return answer["found"]


def read(folder: Path) -> Answers:
    features, probabilities = (np.load(folder / name) for name in ("features.npy", "probabilities.npy"))
    return Answers(_case(folder), features, probabilities, json.loads((folder / "captions.json").read_text()))


def compute(name: str, folder: Path, *, photos: Iterable[Path] = ()) -> Answers:
    """Let Chainer answer a case, and more photos than it names, in `folder`, where it also saves the models.

    Raises EnvironmentUnavailable.
    """
    case = _case(GOLDEN / name)
    case["photos"] += [str(photo) for photo in photos]
    (folder / "case.json").write_text(json.dumps(case))
    environment.run("-m", "tests.chainer.reference", str(folder / "case.json"))
    return read(folder)


def _case(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "case.json").read_text())


def main() -> None:
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            compute(name, Path(folder))
            for answer in ANSWERS:
                shutil.copyfile(Path(folder) / answer, GOLDEN / name / answer)


if __name__ == "__main__":
    main()
