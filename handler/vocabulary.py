"""Words (or characters) and their numbers, and how a caption is cut into them and put together again."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Self

from pydantic import model_validator

from handler.config import Config, Tokenization

PAD, START, END, UNKNOWN = "<pad>", "<sos>", "<eos>", "<unk>"
_WORD = re.compile(r"\w+(?:['’]\w+)*")


class Vocabulary(Config):
    """The tokens in the order of their numbers. Saved in the checkpoint as it is."""

    tokens: tuple[str, ...]
    start: tuple[str, ...] = (START,)
    """The tokens that begin a caption: one, or one for each language of a multilingual model."""
    end: str = END
    unknown: str = UNKNOWN
    pad: str | None = PAD
    suppress_start: bool = True
    """Never generate a start token. chainer-caption's search has no such rule."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if len(self.index) != len(self.tokens):
            twice = [token for token, n in Counter(self.tokens).items() if n > 1]
            raise ValueError(f"tokens stand twice in the vocabulary: {twice[:5]}")
        missing = [t for t in (*self.start, self.end, self.unknown, self.pad) if t is not None and t not in self.index]
        if missing or not self.start:
            raise ValueError(f"special tokens are missing from the vocabulary: {missing}")
        return self

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def index(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}

    @property
    def end_index(self) -> int:
        return self.index[self.end]

    @property
    def unknown_index(self) -> int:
        return self.index[self.unknown]

    @property
    def never_generated(self) -> list[int]:
        """Numbers of the tokens that have no place in a caption: padding and, as a rule, every start token."""
        start = self.start if self.suppress_start else ()
        return [self.index[token] for token in (self.pad, *start) if token is not None]

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """Tokens to numbers; what is not in the vocabulary becomes the unknown token."""
        return [self.index.get(token, self.unknown_index) for token in tokens]

    def decode(self, numbers: Iterable[int]) -> list[str]:
        return [self.tokens[number] for number in numbers]

    @classmethod
    def build(cls, captions: Iterable[Sequence[str]], *, min_count: int, start: tuple[str, ...] = (START,)) -> Self:
        """Special tokens first, then the tokens seen at least `min_count` times, most frequent first."""
        return cls(tokens=(PAD, *start, END, UNKNOWN), start=start).extended(captions, min_count=min_count)

    def extended(self, captions: Iterable[Sequence[str]], *, min_count: int) -> Self:
        """With the tokens that are not in it yet and are seen at least `min_count` times behind its own."""
        counts = Counter(token for caption in captions for token in caption)
        new = sorted((t for t, n in counts.items() if n >= min_count and t not in self.index), key=lambda t: (-counts[t], t))
        return type(self)(**{**self.model_dump(), "tokens": (*self.tokens, *new)})


def tokenize(text: str, tokenization: Tokenization) -> list[str]:
    """Lower-cased words without punctuation, or single characters without white space and punctuation."""
    text = unicodedata.normalize("NFC", text).lower()
    if tokenization == "word":
        return _WORD.findall(text)
    return [c for c in text if not c.isspace() and not unicodedata.category(c).startswith(("P", "C"))]
