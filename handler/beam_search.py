"""Beam search over all beams of all images at once.

With length penalty 0 this is chainer-caption's search, rule by rule: each live caption is extended by its `beam` best
words; of all extensions the `beam` most likely are kept; those that end, or reach the length limit, leave the beam as
found; the search of an image stops once `beam` captions are found. A caption's score is its log-likelihood.

With a length penalty a > 0 the score is log-likelihood / ((5 + n) / 6) ** a for n generated tokens (Wu et al. 2016,
"Google's Neural Machine Translation System", without the coverage term), and a live caption is given up only when it cannot
come to beat the `beam` best found ones.

`handler.openvino_search` does the same in one call, for CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from handler.expansion import Expander, State

if TYPE_CHECKING:
    from torch import Tensor

    from handler.torch_expansion import StepDecoder


@dataclass(frozen=True)
class Search:
    """What is searched for one image."""

    start_token: int
    beam_size: int
    max_length: int
    """Generated tokens at most, the end token included."""
    length_penalty: float = 0.0

    def score(self, log_likelihood: float, length: int) -> float:
        return log_likelihood / self.normalizer(length)

    def normalizer(self, length: int) -> float:
        return float(((5 + length) / 6) ** self.length_penalty)


@dataclass(frozen=True)
class Hypothesis:
    """A caption that was found."""

    tokens: tuple[int, ...]
    """Generated tokens, without the start token. The last is the end token unless the length limit cut the caption."""
    log_likelihoods: tuple[float, ...]
    """Natural logarithm of each token's probability."""
    score: float


class Searcher(Protocol):
    def __call__(self, features: np.ndarray, searches: Sequence[Search]) -> list[list[Hypothesis]]:
        """Features (B, 2048), float32, and what to search for each, to the `beam_size` best captions of each, best first.

        Further ones may follow. They have been found on the way, and there may be better that have not been.
        """
        ...


class Step(NamedTuple):
    """The captions kept in one step, N of them: over all images, or of one."""

    parent: list[int]
    """(N,) which caption of the step before was extended"""
    token: list[int]
    """(N,)"""
    gain: list[float]
    """(N,) log-likelihood of the token"""


class Found(NamedTuple):
    score: float
    step: int
    """From 1 on, so that it is the number of tokens."""
    place: int
    """Among those that the step kept."""


def beam_search(
    decoder: StepDecoder, features: Tensor, searches: Sequence[Search], *, end_token: int, forbidden: Sequence[int]
) -> list[list[Hypothesis]]:
    """Features (B, 2048) and what to search for each to the found captions of each, best first.

    forbidden: tokens that are never generated. Their probability is not spread over the others.
    """
    from handler.torch_expansion import PlainExpander

    expander = PlainExpander(decoder, forbidden, features.device)
    return search(expander, features.cpu().numpy(), searches, end_token=end_token)


def search(
    expander: Expander[State], features: np.ndarray, searches: Sequence[Search], *, end_token: int
) -> list[list[Hypothesis]]:
    """The same with a decoder of any kind. Of beams, the arrays are small: numpy takes a fraction of torch's time a call."""
    if len(features) == 0:
        return []
    images, width = len(searches), max(wanted.beam_size for wanted in searches)
    beam_sizes = np.array([wanted.beam_size for wanted in searches])
    max_lengths = np.array([wanted.max_length for wanted in searches])
    beyond = np.arange(width) >= beam_sizes[:, None]  # (images, width)

    # R live captions; image and slot say where in the (images, width) beam each of them stands
    state = expander.start(features)
    token = np.array([wanted.start_token for wanted in searches])
    image, slot = np.arange(images), np.zeros(images, dtype=np.intp)
    row = np.arange(images)  # in `state`
    place = np.arange(images)  # among those that the last step kept
    total = np.zeros(images, dtype=np.float32)

    history: list[Step] = []
    found: list[list[Found]] = [[] for _ in searches]
    while len(token):
        gains, words, state = expander.expand(state, row, token, width)  # (R, W) each
        ranks = gains.shape[1]
        grid = np.full((images, width, ranks), -np.inf, dtype=np.float32)
        grid[image, slot] = total[:, None] + gains
        totals = grid.reshape(images, width * ranks)
        chosen = np.argsort(-totals, axis=1, kind="stable")[:, :width]  # (images, width)
        totals = np.take_along_axis(totals, chosen, axis=1)
        row_at = np.zeros((images, width), dtype=np.intp)
        row_at[image, slot] = np.arange(len(image))

        # N kept captions, ordered by image, then by rank
        image, slot = ((totals > -np.inf) & ~beyond[:, : chosen.shape[1]]).nonzero()
        at = chosen[image, slot]
        row, rank = row_at[image, at // ranks], at % ranks
        total, token = totals[image, slot], words[row, rank]
        history.append(Step(place[row].tolist(), token.tolist(), gains[row, rank].tolist()))

        ended = (token == end_token) | (len(history) == max_lengths[image])
        place = _live(found, searches, len(history), image, total, ended).nonzero()[0]
        image, slot, token, total, row = image[place], slot[place], token[place], total[place], row[place]

    return [[trace(history, end) for end in sorted(ends, key=lambda end: -end.score)] for ends in found]


def _live(
    found: list[list[Found]],
    searches: Sequence[Search],
    length: int,
    image: np.ndarray,
    total: np.ndarray,
    ended: np.ndarray,
) -> np.ndarray:
    """Add the captions that ended in this step to `found`; say which of the kept ones (N,) are worth going on with."""
    for place in ended.nonzero()[0].tolist():
        number = int(image[place])
        found[number].append(Found(searches[number].score(float(total[place]), length), length, place))
    live = ~ended
    for number, wanted in enumerate(searches):
        if len(found[number]) < wanted.beam_size:
            continue
        if wanted.length_penalty == 0:
            live &= image != number
            continue
        # A log-likelihood can only fall, and the longest length divides it by the most. What takes the place of a caption
        # that leaves is less likely, and as hopeless.
        worst = sorted((end.score for end in found[number]), reverse=True)[wanted.beam_size - 1]
        hopes = total.astype(np.float64) / wanted.normalizer(wanted.max_length)
        live &= (image != number) | (hopes > worst)
    return live


def trace(history: Sequence[Step], end: Found) -> Hypothesis:
    """Follow the parents back from the end of a caption to its first token."""
    tokens, gains, place = [], [], end.place
    for step in reversed(history[: end.step]):
        tokens.append(step.token[place])
        gains.append(step.gain[place])
        place = step.parent[place]
    return Hypothesis(tuple(reversed(tokens)), tuple(reversed(gains)), end.score)
