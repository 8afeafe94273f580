"""The LSTM that writes a caption, fed with the image once and then with its own words.

Vinyals et al. 2015, "Show and Tell", in chainer-caption's form: the embedded image is the LSTM's first input, the start
token its second.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from handler.config import DecoderConfig


class DecoderState(NamedTuple):
    """What the decoder remembers of R captions in the making."""

    hidden: Tensor
    """(R, hidden_size)"""
    cell: Tensor
    """(R, hidden_size)"""

    def select(self, rows: Tensor) -> DecoderState:
        """The states of `rows` (R',), in that order; a row may be taken several times."""
        return DecoderState(self.hidden[rows], self.cell[rows])


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_image = nn.Linear(config.feature_size, config.embedding_size)
        self.embed_token = nn.Embedding(config.vocabulary_size, config.embedding_size)
        self.lstm = nn.LSTM(config.embedding_size, config.hidden_size, batch_first=True)
        self.output = nn.Linear(config.hidden_size, config.vocabulary_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Teacher forcing: features (B, 2048) and tokens (B, T), from the start token on, to logits (B, T, V).

        The logits at position t are for the token after `tokens[:, t]`.
        """
        inputs = torch.cat([self.embed_image(features)[:, None], self.embed_token(tokens)], dim=1)  # (B, 1 + T, E)
        outputs, _ = self.lstm(self.dropout(inputs))
        return self.output(self.dropout(outputs[:, 1:]))

    def start(self, features: Tensor) -> DecoderState:
        """Features (R, 2048) to the state before the start token."""
        zeros = features.new_zeros(len(features), self.config.hidden_size)
        return self._advance(self.embed_image(features), DecoderState(zeros, zeros))

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """One token for each caption (R,) to the logits (R, V) of the next one and the new state."""
        state = self._advance(self.embed_token(tokens), state)
        return self.output(state.hidden), state

    def _advance(self, inputs: Tensor, state: DecoderState) -> DecoderState:
        _, (hidden, cell) = self.lstm(inputs[:, None], (state.hidden[None], state.cell[None]))
        return DecoderState(hidden[0], cell[0])
