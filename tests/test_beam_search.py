"""Beam search against brute force, against chainer-caption's rules spelled out, and against itself in other batches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from handler.beam_search import Search, beam_search
from handler.config import DecoderConfig
from handler.decoder import Decoder, DecoderState

PAD, START, END, UNKNOWN = range(4)
VOCABULARY = 7
FORBIDDEN = [PAD, START, UNKNOWN]


def random_decoder(seed: int, *, hidden: int = 8, vocabulary: int = VOCABULARY) -> Decoder:
    torch.manual_seed(seed)
    decoder = Decoder(DecoderConfig(vocabulary_size=vocabulary, feature_size=6, embedding_size=8, hidden_size=hidden)).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(6)
    return decoder


def log_probabilities(decoder: Decoder, feature: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """(V,) of what follows the start token and `tokens`, from the training path, not from `step`."""
    with torch.no_grad():
        return decoder(feature[None], torch.tensor([[START, *tokens]]))[0, -1].log_softmax(0)


def likelihood(decoder: Decoder, feature: Tensor, tokens: tuple[int, ...]) -> float:
    return sum(float(log_probabilities(decoder, feature, tokens[:n])[tokens[n]]) for n in range(len(tokens)))


def reference_search(
    decoder: Decoder, feature: Tensor, beam: int, depth: int, forbidden: list[int]
) -> list[tuple[float, tuple[int, ...]]]:
    """chainer-caption's search, one state at a time, as its source has it."""
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    found: list[tuple[float, tuple[int, ...]]] = []
    while live and len(found) < beam:
        expanded = []
        for cost, path in live:
            log_p = log_probabilities(decoder, feature, path)
            log_p[forbidden] = -math.inf
            for word in log_p.argsort(descending=True)[:beam].tolist():
                if log_p[word] > -math.inf:
                    expanded.append((cost - float(log_p[word]), (*path, word)))
        live = []
        for cost, path in sorted(expanded)[:beam]:
            (found if path[-1] == END or len(path) + 1 == depth else live).append((cost, path))
    return [(-cost, path) for cost, path in sorted(found)]


@pytest.mark.parametrize("beam", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("seed", range(6))
def test_follows_the_predecessors_rules(seed: int, beam: int) -> None:
    decoder, features = random_decoder(seed), torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
    searches = [Search(START, beam, max_length=8)] * 3
    found = beam_search(decoder, features, searches, end_token=END, forbidden=FORBIDDEN)
    for feature, hypotheses in zip(features, found, strict=True):
        expected = reference_search(decoder, feature, beam, 9, FORBIDDEN)
        assert [h.tokens for h in hypotheses] == [path for _, path in expected]
        assert [h.score for h in hypotheses] == pytest.approx([score for score, _ in expected], abs=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_beam_as_wide_as_the_space_finds_what_brute_force_finds(seed: int, penalty: float) -> None:
    """With 4 words, at most 3 tokens and room for every path, the best of all sentences must come first."""
    decoder, feature, longest = random_decoder(seed), torch.randn(6, generator=torch.Generator().manual_seed(seed)), 3
    words = [w for w in range(VOCABULARY) if w not in FORBIDDEN and w != END]
    sentences = [(*s, END) for n in range(longest) for s in itertools.product(words, repeat=n)]
    sentences += list(itertools.product(words, repeat=longest))
    search = Search(START, beam_size=len(sentences), max_length=longest, length_penalty=penalty)
    ranked = sorted(sentences, key=lambda s: -search.score(likelihood(decoder, feature, s), len(s)))
    (found,) = beam_search(decoder, feature[None], [search], end_token=END, forbidden=FORBIDDEN)
    assert {h.tokens for h in found} == set(sentences)
    assert found[0].tokens == ranked[0]
    for hypothesis in found:
        assert sum(hypothesis.log_likelihoods) == pytest.approx(likelihood(decoder, feature, hypothesis.tokens), abs=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_with_a_length_penalty_stopping_early_loses_nothing(seed: int) -> None:
    """The answer must be that of a search that goes on until every beam has ended."""
    decoder, features = random_decoder(seed), torch.randn(1, 6, generator=torch.Generator().manual_seed(seed))
    search = Search(START, beam_size=3, max_length=10, length_penalty=1.5)

    found = beam_search(decoder, features, [search], end_token=END, forbidden=FORBIDDEN)[0]
    everything = exhaustive_beam(decoder, features[0], search)
    assert [h.tokens for h in found[:3]] == [tokens for _, tokens in everything[:3]]


def exhaustive_beam(decoder: Decoder, feature: Tensor, search: Search) -> list[tuple[float, tuple[int, ...]]]:
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    found = []
    while live:
        expanded = []
        for total, path in live:
            log_p = log_probabilities(decoder, feature, path)
            log_p[FORBIDDEN] = -math.inf
            best = log_p.topk(search.beam_size)
            expanded += [(total + float(v), (*path, int(w))) for v, w in zip(*best, strict=True) if v > -math.inf]
        live = []
        for total, path in sorted(expanded, reverse=True)[: search.beam_size]:
            if path[-1] == END or len(path) == search.max_length:
                found.append((search.score(total, len(path)), path))
            else:
                live.append((total, path))
    return sorted(found, reverse=True)


@given(
    st.lists(
        st.tuples(st.integers(1, 10), st.integers(1, 12), st.sampled_from([0.0, 0.6, 2.0])),
        min_size=2,
        max_size=6,
    )
)
@settings(max_examples=40)
def test_an_image_does_not_see_its_neighbours(wanted: list[tuple[int, int, float]]) -> None:
    """Beam sizes, lengths and penalties of the others in the batch change nothing."""
    decoder = random_decoder(1, vocabulary=30)
    features = torch.randn(len(wanted), 6, generator=torch.Generator().manual_seed(len(wanted)))
    searches = [Search(START, beam, length, penalty) for beam, length, penalty in wanted]
    together = beam_search(decoder, features, searches, end_token=END, forbidden=FORBIDDEN)
    for number, search in enumerate(searches):
        (alone,) = beam_search(decoder, features[number : number + 1], [search], end_token=END, forbidden=FORBIDDEN)
        assert [h.tokens for h in together[number]] == [h.tokens for h in alone]
        for one, other in zip(together[number], alone, strict=True):
            assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-5)


@given(st.integers(0, 1000), st.integers(1, 10), st.integers(1, 15), st.sampled_from([0.0, 1.0]))
@settings(max_examples=60)
def test_every_found_caption_is_well_formed(seed: int, beam: int, length: int, penalty: float) -> None:
    decoder = random_decoder(seed)
    features = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed))
    for found in beam_search(decoder, features, [Search(START, beam, length, penalty)] * 2, end_token=END, forbidden=FORBIDDEN):
        assert found, "an image without any caption"
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
        assert len({h.tokens for h in found}) == len(found)
        for h in found:
            assert not set(h.tokens) & set(FORBIDDEN)
            assert len(h.tokens) <= length
            assert (h.tokens[-1] == END) or len(h.tokens) == length
            assert END not in h.tokens[:-1]
            assert len(h.log_likelihoods) == len(h.tokens)
            assert all(value <= 0 for value in h.log_likelihoods)


def test_forbidden_words_keep_their_probability() -> None:
    """A caption's likelihood is the model's own, not one in which suppressed words were given to the others."""
    decoder, feature = random_decoder(3), torch.ones(6)
    (found,) = beam_search(decoder, feature[None], [Search(START, 1, 1)], end_token=END, forbidden=FORBIDDEN)
    assert found[0].log_likelihoods[0] == pytest.approx(likelihood(decoder, feature, found[0].tokens[:1]), abs=1e-5)


def test_no_images_give_no_captions() -> None:
    assert beam_search(random_decoder(0), torch.empty(0, 6), [], end_token=END, forbidden=FORBIDDEN) == []


def test_finished_images_cost_no_more_steps() -> None:
    """The decoder sees the live captions only."""
    seen: list[int] = []

    class Counting:
        def start(self, features: Tensor) -> DecoderState:
            return DecoderState(torch.zeros(len(features), 1), torch.zeros(len(features), 1))

        def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
            seen.append(len(tokens))
            return torch.zeros(len(tokens), VOCABULARY).index_fill(1, torch.tensor([4]), 5.0), state

    beam_search(Counting(), torch.zeros(2, 1), [Search(START, 1, 2), Search(START, 1, 4)], end_token=END, forbidden=FORBIDDEN)
    assert seen == [2, 2, 1, 1]
