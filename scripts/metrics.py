"""Scores of captions against what people wrote: pycocoevalcap's, and CIDEr as a reward for training.

References and captions are told apart by photo: element n of both belongs to photo n.
"""

from __future__ import annotations

import contextlib
import io
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from handler.config import LanguageConfig
from handler.errors import CaptionError
from handler.vocabulary import tokenize

SIGMA = 6.0
"""Of CIDEr-D's penalty for a length other than the reference's."""


class MetricError(CaptionError):
    """A metric cannot be computed on this machine."""


@dataclass(frozen=True)
class Scores:
    """The metrics of a set of captions, 0 to 1 (CIDEr to 10), and CIDEr of each photo."""

    metrics: dict[str, float]
    cider: list[float]


def ptb_tokens(texts: Sequence[Sequence[str]], language: LanguageConfig) -> dict[int, list[str]]:
    """Texts by photo as pycocoevalcap's scorers take them: lower-cased tokens with a space between.

    English words are cut by the Penn Treebank tokenizer, as published scores have it, other languages by ours.
    """
    if language.code.partition("-")[0] != "en":
        return plain_tokens(texts, language)
    if shutil.which("java") is None:
        raise MetricError("the Penn Treebank tokenizer and METEOR need Java: install openjdk-17-jre-headless")
    given = {photo: [{"caption": text} for text in captions] for photo, captions in enumerate(texts)}
    tokenized: dict[int, list[str]] = PTBTokenizer().tokenize(given)
    return tokenized


def plain_tokens(texts: Sequence[Sequence[str]], language: LanguageConfig) -> dict[int, list[str]]:
    """The same with the model's own tokenization, which needs no Java."""
    return {n: [" ".join(tokenize(text, language.tokenization)) for text in captions] for n, captions in enumerate(texts)}


def scores(references: dict[int, list[str]], captions: dict[int, list[str]], *, meteor: bool = False) -> Scores:
    """BLEU-1 to BLEU-4, ROUGE-L, CIDEr, and METEOR (English only, by Java) if wanted; both arguments tokenized."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocoevalcap's Bleu prints the lengths
        bleu, _ = Bleu(4).compute_score(references, captions)
        rouge, _ = Rouge().compute_score(references, captions)
        cider, each = Cider().compute_score(references, captions)
        metrics = {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, 1)}
        if meteor:
            scorer = Meteor()
            with scorer.meteor_p:  # ends the Java process, which pycocoevalcap leaves to the garbage collector
                metrics["METEOR"] = float(scorer.compute_score(references, captions)[0])
    metrics |= {"ROUGE-L": float(rouge), "CIDEr": float(cider)}
    return Scores(metrics, [float(value) for value in each])


NGram = tuple[str, ...]


def _ngrams(tokens: Sequence[str]) -> Counter[NGram]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, 5) for i in range(len(tokens) - n + 1))


@dataclass(frozen=True)
class _Vector:
    """The n-grams of a sentence, weighted by tf-idf."""

    weights: dict[NGram, float]
    norms: tuple[float, float, float, float]
    length: int


class CiderReward:
    """CIDEr-D of single captions, with the document frequencies of a fixed corpus (Vedantam et al. 2015).

    The numbers are those of pycocoevalcap's Cider over that corpus; the references are prepared once, so that it is fast
    enough to be computed for every sampled caption of a training step.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[str]]]) -> None:
        """references: the tokens of each caption of each photo."""
        counted = [[_ngrams(tokens) for tokens in captions] for captions in references]
        self.frequency = Counter(ngram for captions in counted for ngram in set().union(*captions))
        self.log_photos = math.log(len(references))
        self.references = [[self._vector(counts) for counts in captions] for captions in counted]

    def __call__(self, photo: int, tokens: Sequence[str]) -> float:
        """CIDEr-D (0 to 10) of a caption's tokens for a photo of the corpus."""
        caption = self._vector(_ngrams(tokens))
        references = self.references[photo]
        return 10 * sum(self._similarity(caption, reference) for reference in references) / len(references)

    def _vector(self, counts: Counter[NGram]) -> _Vector:
        weights = {g: n * (self.log_photos - math.log(max(1, self.frequency[g]))) for g, n in counts.items()}
        squares = [0.0] * 4
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        norms = tuple(math.sqrt(square) for square in squares)
        # pycocoevalcap measures the length in bigrams.
        return _Vector(weights, norms, sum(n for ngram, n in counts.items() if len(ngram) == 2))  # type: ignore[arg-type]

    @staticmethod
    def _similarity(caption: _Vector, reference: _Vector) -> float:
        products = [0.0] * 4
        for ngram, weight in caption.weights.items():
            other = reference.weights.get(ngram)
            if other is not None:
                products[len(ngram) - 1] += min(weight, other) * other
        cosines = (p / (a * b) if a and b else p for p, a, b in zip(products, caption.norms, reference.norms, strict=True))
        return math.exp(-((caption.length - reference.length) ** 2) / (2 * SIGMA**2)) * sum(cosines) / 4


def distinct_share(captions: Iterable[str]) -> float:
    """How many of the captions differ from all others before them."""
    texts = list(captions)
    return len(set(texts)) / len(texts)
