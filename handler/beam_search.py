"""Beam search over all beams of all images at once.

With length penalty 0 this is chainer-caption's search, rule by rule: each live caption is extended by its `beam` best
words; of all extensions the `beam` most likely are kept; those that end, or reach the length limit, leave the beam as
found; the search of an image stops once `beam` captions are found. A caption's score is its log-likelihood.

With a length penalty a > 0 the score is log-likelihood / ((5 + n) / 6) ** a for n generated tokens (Wu et al. 2016,
"Google's Neural Machine Translation System", without the coverage term), and an image stops only when no live caption
can come to beat the `beam` best found ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from handler.decoder import DecoderState


@dataclass(frozen=True)
class Search:
    """What is searched for one image."""

    start_token: int
    beam_size: int
    max_length: int
    """Generated tokens at most, the end token included."""
    length_penalty: float = 0.0

    def score(self, log_likelihood: float, length: int) -> float:
        return log_likelihood / ((5 + length) / 6) ** self.length_penalty


@dataclass(frozen=True)
class Hypothesis:
    """A caption that was found."""

    tokens: tuple[int, ...]
    """Generated tokens, without the start token. The last is the end token unless the length limit cut the caption."""
    log_likelihoods: tuple[float, ...]
    """Natural logarithm of each token's probability."""
    score: float


class StepDecoder(Protocol):
    """What the search needs of a decoder; see `handler.decoder.Decoder`."""

    def start(self, features: Tensor) -> DecoderState: ...

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]: ...


class _Step(NamedTuple):
    """The captions kept in one step, over all images: N of them."""

    parent: np.ndarray
    """(N,) which caption of the step before was extended"""
    token: np.ndarray
    """(N,)"""
    gain: np.ndarray
    """(N,) log-likelihood of the token"""


class _Found(NamedTuple):
    score: float
    step: int
    place: int


@torch.inference_mode()
def beam_search(
    decoder: StepDecoder, features: Tensor, searches: Sequence[Search], *, end_token: int, forbidden: Sequence[int]
) -> list[list[Hypothesis]]:
    """Features (B, 2048) and what to search for each to the found captions of each, best first.

    forbidden: tokens that are never generated. Their probability is not spread over the others.
    """
    if len(features) == 0:
        return []
    device = features.device
    images, width = len(searches), max(search.beam_size for search in searches)
    beam_sizes = torch.tensor([search.beam_size for search in searches], device=device)
    max_lengths = torch.tensor([search.max_length for search in searches], device=device)
    ranks = torch.arange(width, device=device)
    banned = torch.tensor(list(forbidden), device=device, dtype=torch.long)

    # R live captions; image and slot say where in the (images, width) beam each of them stands
    state = decoder.start(features)
    token = torch.tensor([search.start_token for search in searches], device=device)
    image = torch.arange(images, device=device)
    slot = torch.zeros_like(image)
    total = torch.zeros(images, device=device)
    place = np.arange(images)  # of a live caption among those that the last step kept

    history: list[_Step] = []
    found: list[list[_Found]] = [[] for _ in searches]
    while len(token):
        logits, state = decoder.step(token, state)  # (R, V)
        logits = logits.float()
        normalizer = logits.logsumexp(dim=1, keepdim=True)
        logits = logits.index_fill(1, banned, -torch.inf)
        best, words = logits.topk(min(width, logits.shape[1]), dim=1)  # (R, W)
        gains = (best - normalizer).masked_fill(ranks[: best.shape[1]] >= beam_sizes[image, None], -torch.inf)

        grid = gains.new_full((images, width, gains.shape[1]), -torch.inf)
        grid[image, slot] = total[:, None] + gains
        totals, chosen = grid.flatten(1).topk(width, dim=1)  # (images, width)
        row_at = image.new_zeros(images, width)
        row_at[image, slot] = torch.arange(len(image), device=device)
        kept = (totals > -torch.inf) & (ranks < beam_sizes[:, None])

        # N kept captions, ordered by image, then by rank
        image, slot = kept.nonzero(as_tuple=True)
        row, word_rank = row_at.gather(1, chosen // grid.shape[2])[kept], (chosen % grid.shape[2])[kept]
        total, token = totals[kept], words[row, word_rank]
        history.append(_Step(place[row.cpu().numpy()], token.cpu().numpy(), gains[row, word_rank].cpu().numpy()))

        ended = (token == end_token) | (len(history) == max_lengths[image])
        live = ~ended & ~_record(found, searches, len(history), image, total, ended)[image]
        place = live.nonzero()[:, 0].cpu().numpy()
        state = state.select(row[live])
        image, slot, token, total = image[live], slot[live], token[live], total[live]

    return [[_trace(history, end) for end in sorted(ends, key=lambda end: -end.score)] for ends in found]


def _record(
    found: list[list[_Found]], searches: Sequence[Search], length: int, image: Tensor, total: Tensor, ended: Tensor
) -> Tensor:
    """Add the captions that ended in this step to `found`; say for which images (B,) the search is over."""
    totals, images, ends = total.cpu().numpy(), image.cpu().numpy(), ended.cpu().numpy()
    over = np.zeros(len(searches), dtype=bool)
    for place in ends.nonzero()[0]:
        search = searches[images[place]]
        found[images[place]].append(_Found(search.score(float(totals[place]), length), length, int(place)))
    for number, search in enumerate(searches):
        if len(found[number]) < search.beam_size:
            continue
        if search.length_penalty == 0:
            over[number] = True
            continue
        # A live caption's log-likelihood can only fall, and the longest length divides it by the most.
        hopes = totals[(images == number) & ~ends]
        hope = search.score(float(hopes.max()), search.max_length) if len(hopes) else -np.inf
        over[number] = sorted((end.score for end in found[number]), reverse=True)[search.beam_size - 1] >= hope
    return torch.from_numpy(over).to(image.device)


def _trace(history: list[_Step], end: _Found) -> Hypothesis:
    """Follow the parents back from the end of a caption to its first token."""
    tokens, gains, place = [], [], end.place
    for step in reversed(history[: end.step]):
        tokens.append(int(step.token[place]))
        gains.append(float(step.gain[place]))
        place = int(step.parent[place])
    return Hypothesis(tuple(reversed(tokens)), tuple(reversed(gains)), end.score)
