"""The training path and the search path of the decoder are one function."""

from __future__ import annotations

import torch

from handler.config import DecoderConfig
from handler.decoder import Decoder


def make() -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(vocabulary_size=11, feature_size=7, embedding_size=5, hidden_size=6)).eval()


def test_steps_agree_with_teacher_forcing() -> None:
    decoder, features, tokens = make(), torch.randn(3, 7), torch.randint(0, 11, (3, 4))
    with torch.inference_mode():
        expected = decoder(features, tokens)
        state = decoder.start(features)
        for position in range(4):
            logits, state = decoder.step(tokens[:, position], state)
            torch.testing.assert_close(logits, expected[:, position])


def test_its_shapes_are_those_that_weights_are_checked_against() -> None:
    decoder = make()
    assert {name: tuple(value.shape) for name, value in decoder.state_dict().items()} == decoder.config.shapes


def test_the_image_matters() -> None:
    decoder, tokens = make(), torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        assert not torch.allclose(decoder(torch.zeros(1, 7), tokens), decoder(torch.ones(1, 7), tokens))


def test_selected_rows_keep_their_memory() -> None:
    decoder = make()
    with torch.inference_mode():
        state = decoder.start(torch.randn(3, 7))
        picked = state.select(torch.tensor([2, 0, 2]))
    torch.testing.assert_close(picked.hidden, state.hidden[[2, 0, 2]])
    torch.testing.assert_close(picked.cell, state.cell[[2, 0, 2]])
