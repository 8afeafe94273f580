"""The folded decoders do, step by step and caption by caption, what the decoder does as it was trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from handler.beam_search import Search, search
from handler.cuda_graphs import RecordedExpander
from handler.expansion import Expander, fold
from handler.networks import weights_of
from handler.torch_expansion import PlainExpander, TorchExpander
from tests.test_beam_search import END, FORBIDDEN, START, random_decoder

VOCABULARY = 40
DECODER = random_decoder(5, hidden=16, vocabulary=VOCABULARY)


def by_openvino(precision: str = "f32") -> Expander[Any]:
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install -r requirements/serve.txt")
    from handler.openvino_engine import OpenVinoExpander

    return OpenVinoExpander(fold(weights_of(DECODER), FORBIDDEN), precision=precision, threads=1)


FOLDED: dict[str, Callable[[], Expander[Any]]] = {
    "torch": lambda: TorchExpander(fold(weights_of(DECODER), FORBIDDEN)),
    "recorded": lambda: RecordedExpander(fold(weights_of(DECODER), FORBIDDEN)),
    "openvino": by_openvino,
}


@pytest.fixture(scope="module", params=FOLDED)
def folded(request: pytest.FixtureRequest) -> Expander[Any]:
    return FOLDED[request.param]()


def features(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 6), np.float32)


@given(
    st.lists(st.tuples(st.integers(1, 10), st.integers(1, 12), st.sampled_from([0.0, 0.75, 2.0])), min_size=1, max_size=6),
    st.integers(0, 100),
)
@example([(10, 12, 0.75)] * 20, 0)  # more captions than one step is recorded for, and fewer again
@settings(max_examples=40)
def test_the_same_captions_as_the_plain_search(folded: Expander[Any], wanted: list[tuple[int, int, float]], seed: int) -> None:
    searches = [Search(START, *values) for values in wanted]
    images = features(len(searches), seed)
    expected = search(PlainExpander(DECODER, FORBIDDEN), images, searches, end_token=END)
    found = search(folded, images, searches, end_token=END)
    for plain, fast in zip(expected, found, strict=True):
        assert [h.tokens for h in plain] == [h.tokens for h in fast]
        for one, other in zip(plain, fast, strict=True):
            assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-5)


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


def test_in_bfloat16_no_step_is_off_by_more_than_its_rounding() -> None:
    """However many steps went before: what is rounded does not add up."""
    exact, rounded = by_openvino(), by_openvino("bf16")
    state, rounded_state = exact.start(features(4, 2)), rounded.start(features(4, 2))
    at, of = torch.arange(4).numpy(), torch.tensor([START] * 4).numpy()
    for _ in range(30):
        gains, words, state = exact.expand(state, at, of, 5)
        rounded_gains, _, rounded_state = rounded.expand(rounded_state, at, of, 5)
        assert rounded_gains == pytest.approx(gains, abs=0.04)
        of = words[:, 0]


def test_in_bfloat16_close_words_are_told_apart_however_large_the_logits() -> None:
    """The sums are not rounded: near 200 two neighbours of bfloat16 are 1 apart, and many words would tie."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install -r requirements/serve.txt")
    from handler.openvino_engine import OpenVinoExpander

    plain = fold(weights_of(DECODER), FORBIDDEN)
    raised = plain._replace(product_bias=plain.product_bias + np.where(np.arange(len(plain.product_bias)) < 4 * 16, 0, 200))
    raised = raised._replace(product_bias=raised.product_bias.astype(np.float32))
    found = []
    for folded in (plain, raised):
        expander = OpenVinoExpander(folded, precision="bf16", threads=1)
        found.append(expander.expand(expander.start(features(4, 2)), np.arange(4), np.full(4, START), 10)[0])
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    assert (np.diff(found[1]) < 0).all()
