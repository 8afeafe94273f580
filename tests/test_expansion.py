"""The folded decoders, and the search in one graph, do step by step and caption by caption what the plain ones do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from handler.beam_search import Search, Searcher, search
from handler.cuda_graphs import RecordedExpander
from handler.engine import INT8_FLAGS, cpu_flags
from handler.expansion import Expander, fold
from handler.networks import weights_of
from handler.torch_expansion import PlainExpander, TorchExpander
from tests.test_beam_search import END, FORBIDDEN, START, random_decoder

VOCABULARY = 40
DECODER = random_decoder(5, hidden=16, vocabulary=VOCABULARY)


FOLDED: dict[str, Callable[[], Expander[Any]]] = {
    "torch": lambda: TorchExpander(fold(weights_of(DECODER), FORBIDDEN)),
    "recorded": lambda: RecordedExpander(fold(weights_of(DECODER), FORBIDDEN)),
}


def openvino_search(precision: str = "f32", raised: float = 0.0) -> Searcher:
    """raised: what is added to all logits."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install -r requirements/serve.txt")
    from handler.openvino_engine import has_bfloat16
    from handler.openvino_search import OpenVinoSearch

    if precision == "bf16" and not has_bfloat16():
        pytest.skip("the CPU has no instructions for bfloat16")
    if precision == "int8" and not INT8_FLAGS & cpu_flags():
        pytest.skip("the CPU has no instructions for int8")

    folded = fold(weights_of(DECODER), FORBIDDEN)
    logits = np.arange(len(folded.product_bias)) >= folded.table.shape[1]
    folded = folded._replace(product_bias=np.where(logits, folded.product_bias + raised, 0).astype(np.float32))
    return OpenVinoSearch(folded, END, precision=precision, threads=1)


@pytest.fixture(scope="module", params=FOLDED)
def folded(request: pytest.FixtureRequest) -> Expander[Any]:
    return FOLDED[request.param]()


@pytest.fixture(scope="module", params=[*FOLDED, "openvino"])
def searcher(request: pytest.FixtureRequest) -> Searcher:
    if request.param == "openvino":
        return openvino_search()
    return partial(search, FOLDED[request.param](), end_token=END)


def features(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 6), np.float32)


@given(
    st.lists(st.tuples(st.integers(1, 10), st.integers(1, 12), st.sampled_from([0.0, 0.75, 2.0])), min_size=1, max_size=6),
    st.integers(0, 100),
)
@example([(10, 12, 0.75)] * 20, 0)  # more captions than one step is recorded for, and fewer again
@settings(max_examples=40)
def test_the_same_captions_as_the_plain_search(searcher: Searcher, wanted: list[tuple[int, int, float]], seed: int) -> None:
    searches = [Search(START, *values) for values in wanted]
    images = features(len(searches), seed)
    expected = search(PlainExpander(DECODER, FORBIDDEN), images, searches, end_token=END)
    found = searcher(images, searches)
    for plain, fast, wanted_of_one in zip(expected, found, searches, strict=True):
        if not isinstance(searcher, partial):  # OpenVINO's search gives no more than those
            plain = plain[: wanted_of_one.beam_size]
        assert [h.tokens for h in plain] == [h.tokens for h in fast]
        for one, other in zip(plain, fast, strict=True):
            assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-5)
            assert one.score == pytest.approx(other.score, abs=1e-4)


def test_rows_may_be_taken_twice_or_not_at_all(folded: Expander[Any]) -> None:
    plain = PlainExpander(DECODER, FORBIDDEN)
    expected, state = plain.start(features(3, 0)), folded.start(features(3, 0))
    for rows, tokens in (([2, 0, 2, 1], [1, 4, 5, 6]), ([3, 3], [7, 8]), ([1], [9])):
        at, of = torch.tensor(rows).numpy(), torch.tensor(tokens).numpy()
        gains, words, expected = plain.expand(expected, at, of, 4)
        fast_gains, fast_words, state = folded.expand(state, at, of, 4)
        assert fast_words.tolist() == words.tolist()
        assert fast_gains == pytest.approx(gains, abs=1e-5)


def test_what_is_forbidden_comes_last_and_keeps_its_probability(folded: Expander[Any]) -> None:
    """All words in order: the forbidden ones at the end, and the others' probabilities do not add up to 1."""
    state = folded.start(features(1, 1))
    gains, words, _ = folded.expand(state, torch.tensor([0]).numpy(), torch.tensor([START]).numpy(), 10)
    assert not set(words[0].tolist()) & set(FORBIDDEN)
    with torch.no_grad():
        expected = DECODER(torch.from_numpy(features(1, 1)), torch.tensor([[START]]))[0, -1].log_softmax(0)
    assert gains[0] == pytest.approx(expected[torch.from_numpy(words[0]).long()].numpy(), abs=1e-5)


def test_no_images_give_no_captions(searcher: Searcher) -> None:
    assert searcher(features(0, 0), []) == []


ROUNDED = pytest.mark.parametrize("precision", ["bf16", "int8"])


@ROUNDED
def test_no_step_is_off_by_more_than_its_rounding(precision: str) -> None:
    """However many steps went before: what is rounded does not add up."""
    images, longest = torch.from_numpy(features(8, 2)), 30
    steps = 0
    found = openvino_search(precision)(images.numpy(), [Search(START, 5, longest, 2.0)] * 8)
    for image, hypotheses in zip(images, found, strict=True):
        for hypothesis in hypotheses:
            tokens = torch.tensor([[START, *hypothesis.tokens[:-1]]])
            with torch.no_grad():
                exact = DECODER(image[None], tokens)[0].log_softmax(1)[range(len(hypothesis.tokens)), hypothesis.tokens]
            assert hypothesis.log_likelihoods == pytest.approx(exact.tolist(), abs=0.04)
            steps = max(steps, len(hypothesis.tokens))
    assert steps == longest


@ROUNDED
def test_close_words_are_told_apart_however_large_the_logits(precision: str) -> None:
    """The sums are not rounded: near 200 two neighbours of bfloat16 are 1 apart, and many words would tie."""
    images, wanted = features(4, 2), [Search(START, 10, 1)] * 4
    found = [openvino_search(precision, raised)(images, wanted) for raised in (0, 200)]
    for near, far in zip(*found, strict=True):
        assert [h.tokens for h in near] == [h.tokens for h in far]
        assert [h.score for h in near] == pytest.approx([h.score for h in far], abs=1e-3)
        assert (np.diff([h.score for h in far]) < 0).all()
