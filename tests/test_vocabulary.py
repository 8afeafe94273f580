"""Tokens, their numbers, and how text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from handler.vocabulary import END, PAD, START, UNKNOWN, Vocabulary, tokenize


def test_words_are_lower_cased_and_lose_their_punctuation() -> None:
    assert tokenize("A man's dog, running - fast!", "word") == ["a", "man's", "dog", "running", "fast"]


def test_characters_lose_white_space_and_punctuation() -> None:
    assert tokenize("一只狗 在草地上。", "character") == list("一只狗在草地上")


def test_composed_and_decomposed_letters_are_one() -> None:
    assert tokenize("cafe\u0301", "word") == tokenize("caf\u00e9", "word")


def test_rare_words_are_left_out_and_the_order_is_by_frequency_then_name() -> None:
    vocabulary = Vocabulary.build([["dog", "a"], ["dog", "cat"], ["a", "dog"], ["rare"]], min_count=2)
    assert vocabulary.tokens == (PAD, START, END, UNKNOWN, "dog", "a")
    assert vocabulary.encode(["a", "rare"]) == [5, vocabulary.unknown_index]


@given(st.lists(st.lists(st.text("abc", min_size=1), min_size=1), min_size=1))
def test_known_tokens_come_back(captions: list[list[str]]) -> None:
    vocabulary = Vocabulary.build(captions, min_count=1)
    for caption in captions:
        assert vocabulary.decode(vocabulary.encode(caption)) == caption


def test_special_tokens_written_in_a_caption_are_not_counted_twice() -> None:
    assert Vocabulary.build([[START, "dog", END]], min_count=1).tokens.count(START) == 1


@pytest.mark.parametrize("tokens", [("a", "a", START, END, UNKNOWN, PAD), (START, END, PAD), ()])
def test_a_broken_vocabulary_is_refused(tokens: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError):
        Vocabulary(tokens=tokens)


def test_start_tokens_of_every_language_and_padding_are_never_generated() -> None:
    vocabulary = Vocabulary.build([["a"]], min_count=1, start=("<en>", "<ja>"))
    assert vocabulary.decode(vocabulary.never_generated) == [PAD, "<en>", "<ja>"]


def test_start_tokens_can_be_left_to_the_search_as_in_chainer_caption() -> None:
    vocabulary = Vocabulary(tokens=("<sos>", "<eos>", "<ukn>"), unknown="<ukn>", pad=None, suppress_start=False)
    assert vocabulary.never_generated == []


def test_new_tokens_come_behind_the_known_ones_which_keep_their_numbers() -> None:
    known = Vocabulary.build([["a", "dog"]], min_count=1)
    larger = known.extended([["a", "cat", "sleeps"], ["cat"]], min_count=2)
    assert larger.tokens == (*known.tokens, "cat")
    assert larger.index["cat"] == len(known)
    assert known.extended([], min_count=1) == known
