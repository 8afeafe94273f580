"""Scores are pycocoevalcap's to the last digit; the reward for training is its CIDEr."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from handler.config import LanguageConfig
from scripts.metrics import CiderReward, distinct_share, plain_tokens, ptb_tokens, scores

ENGLISH, CHINESE = LanguageConfig(code="en"), LanguageConfig(code="zh", tokenization="character")
REFERENCES = [["A dog runs .", "The dog's running fast!"], ["Two cats sleep", "Cats, asleep"], ["A man on a bike ."]]
CAPTIONS = ["a dog runs fast", "two dogs sleep", "a man rides a bike"]


def test_the_tokenization_of_each_language() -> None:
    assert plain_tokens([["A dog runs ."]], ENGLISH) == {0: ["a dog runs"]}
    assert ptb_tokens([["一只狗。", "狗"]], CHINESE) == {0: ["一 只 狗", "狗"]}


@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_scores_agree_with_pycocoevalcap_called_directly() -> None:
    gts = PTBTokenizer().tokenize({n: [{"caption": text} for text in texts] for n, texts in enumerate(REFERENCES)})
    res = PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate(CAPTIONS)})
    ours = scores(ptb_tokens(REFERENCES, ENGLISH), ptb_tokens([[c] for c in CAPTIONS], ENGLISH), meteor=True)
    for n, value in enumerate(Bleu(4).compute_score(gts, res, verbose=0)[0], 1):
        assert ours.metrics[f"BLEU-{n}"] == value
    meteor = Meteor()
    with meteor.meteor_p:
        assert ours.metrics["METEOR"] == pytest.approx(meteor.compute_score(gts, res)[0], abs=1e-12)
    assert ours.metrics["ROUGE-L"] == pytest.approx(Rouge().compute_score(gts, res)[0], abs=1e-12)
    assert ours.metrics["CIDEr"] == pytest.approx(Cider().compute_score(gts, res)[0], abs=1e-12)
    assert ours.cider == list(Cider().compute_score(gts, res)[1])


WORDS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=7)


@given(st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=2, max_size=6))
def test_the_reward_is_cider(photos: list[tuple[list[str], list[list[str]]]]) -> None:
    references = {n: [" ".join(c) for c in captions] for n, (_, captions) in enumerate(photos)}
    captions = {n: [" ".join(caption)] for n, (caption, _) in enumerate(photos)}
    expected = Cider().compute_score(references, captions)[1]
    reward = CiderReward([captions for _, captions in photos])
    assert [reward(n, caption) for n, (caption, _) in enumerate(photos)] == pytest.approx(list(expected), abs=1e-9)


def test_distinct_share() -> None:
    assert distinct_share(["a", "b", "a", "a"]) == 0.5
