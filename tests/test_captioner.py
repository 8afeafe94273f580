"""From the bytes of photos to captions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from handler.captioner import Caption, CaptionedImage, Captioner, PreparedImage
from handler.checkpoint import Checkpoint
from handler.config import LanguageConfig
from handler.parameters import parse_parameters
from tests.conftest import SAMPLES


def caption(captioner: Captioner, images: list[PreparedImage], **values: object) -> list[CaptionedImage]:
    return captioner.caption(images, [parse_parameters(values, captioner.config)] * len(images))


@pytest.fixture(scope="module")
def images(captioner: Captioner) -> list[PreparedImage]:
    return [captioner.prepare(path.read_bytes()) for path in SAMPLES * 2]


def test_eight_at_once_are_what_eight_alone_are(captioner: Captioner, images: list[PreparedImage]) -> None:
    together = caption(captioner, images)
    assert len(together) == 8
    for image, found in zip(images, together, strict=True):
        (alone,) = caption(captioner, [image])
        assert [c.caption for c in alone.captions] == [c.caption for c in found.captions]
        for one, other in zip(alone.captions, found.captions, strict=True):
            assert one.token_log_likelihoods == pytest.approx(other.token_log_likelihoods, abs=1e-5)


def test_scores_are_what_the_contract_says(captioner: Captioner, images: list[PreparedImage]) -> None:
    for found in caption(captioner, images[:2], beam_size=4):
        for c in found.captions:
            generated = len(c.sentence) - 1
            assert len(c.token_log_likelihoods) == generated
            assert c.log_likelihood == pytest.approx(sum(c.token_log_likelihoods))
            assert c.confidence == pytest.approx(math.exp(c.log_likelihood / generated))
            assert c.sentence[0] == "<sos>"
            assert c.caption == " ".join(w for w in c.sentence[1:] if w != "<eos>")
            assert not {"<sos>", "<pad>", "<unk>"} & set(c.sentence[1:])


def test_no_two_captions_read_the_same(captioner: Captioner, images: list[PreparedImage]) -> None:
    """A caption cut at the limit and one that ends there can have the same words."""
    for length in (1, 2, 3):
        for found in caption(captioner, images[:4], beam_size=10, max_length=length):
            texts = [c.caption for c in found.captions]
            assert len(set(texts)) == len(texts)


def test_num_captions_and_min_confidence_leave_captions_out(captioner: Captioner, images: list[PreparedImage]) -> None:
    (everything,) = caption(captioner, images[:1])
    (two,) = caption(captioner, images[:1], num_captions=2)
    assert two.captions == everything.captions[:2]
    threshold = sorted(c.confidence for c in everything.captions)[1]
    (sure,) = caption(captioner, images[:1], min_confidence=threshold)
    assert {c.caption for c in sure.captions} == {c.caption for c in everything.captions if c.confidence >= threshold}
    assert caption(captioner, images[:1], min_confidence=1.0)[0].captions == ()


def test_unknown_words_are_generated_only_where_the_model_says_so(checkpoint: Checkpoint, images: list[PreparedImage]) -> None:
    unknown = checkpoint.vocabulary.unknown_index
    decoder = checkpoint.decoder
    with torch.no_grad():
        decoder.output.bias[unknown] += 50
    try:
        config = checkpoint.config
        allowed = config.model_copy(update={"search": config.search.model_copy(update={"suppress_unknown": False})})
        (suppressed,) = caption(Captioner(checkpoint), images[:1])
        (kept,) = caption(Captioner(dataclasses.replace(checkpoint, config=allowed)), images[:1])
    finally:
        with torch.no_grad():
            decoder.output.bias[unknown] -= 50
    assert all("<unk>" not in c.sentence for c in suppressed.captions)
    assert "<unk>" in kept.captions[0].sentence


def test_characters_are_joined_without_spaces(checkpoint: Checkpoint, images: list[PreparedImage]) -> None:
    config = checkpoint.config.model_copy(update={"languages": (LanguageConfig(code="zh", tokenization="character"),)})
    (found,) = caption(Captioner(dataclasses.replace(checkpoint, config=config)), images[:1])
    assert found.language == "zh"
    longest: Caption = max(found.captions, key=lambda c: len(c.sentence))
    assert longest.caption == "".join(w for w in longest.sentence[1:] if w != "<eos>")


def test_the_photo_is_described_as_it_was_sent(captioner: Captioner, encoded: Callable[..., bytes]) -> None:
    prepared = captioner.prepare(encoded("PNG"))
    assert (prepared.width, prepared.height, prepared.format) == (90, 60, "PNG")
    assert prepared.pixels.shape == (3, 64, 64)


def test_no_images(captioner: Captioner) -> None:
    assert captioner.caption([], []) == []
