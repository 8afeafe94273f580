"""One step of the search: every live caption, extended by one token. The decoder as the beam search drives it.

`PlainExpander` asks the decoder as it was trained and is what the others are tested against. They do the same arithmetic
with less of it and in fewer calls. The product of the hidden state h with the output weights gives the logits of this
step, its product with the recurrent weights is needed in the next one, so one product with both does. What a token
contributes to the next step's gates, W_ih embedding + b, depends on the token alone: a table, filled once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from handler.decoder import Decoder, DecoderState

State = TypeVar("State")


class StepDecoder(Protocol):
    """What `PlainExpander` needs of a decoder; see `handler.decoder.Decoder`."""

    def start(self, features: Tensor) -> DecoderState: ...

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]: ...


class Expander(Protocol[State]):
    """The arrays are of numpy, since what the search does with them is small."""

    def start(self, features: Tensor) -> State:
        """Features (B, 2048) to the state of B captions before their start token."""
        ...

    def expand(self, state: State, rows: np.ndarray, tokens: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, State]:
        """Give each caption its token, and find the likeliest next ones.

        rows: (R,) where in `state` each caption's memory is; tokens: (R,) the token it is extended by.

        Returns the log-likelihoods of the `width` likeliest next tokens (R, W), best first, -inf for those that must not
        be generated, the tokens themselves (R, W), and the new state, in the order of `rows`. W is `width`, or the size
        of the vocabulary where that is less. The state must be used, if at all, for the next call.
        """
        ...


class PlainExpander:
    """Any decoder that makes steps, as it is."""

    def __init__(self, decoder: StepDecoder, forbidden: Sequence[int]) -> None:
        self._decoder = decoder
        self._forbidden = list(forbidden)

    @torch.inference_mode()
    def start(self, features: Tensor) -> DecoderState:
        return self._decoder.start(features)

    @torch.inference_mode()
    def expand(
        self, state: DecoderState, rows: np.ndarray, tokens: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray, DecoderState]:
        device = state.hidden.device
        selected = state.select(torch.from_numpy(rows).to(device))
        logits, state = self._decoder.step(torch.from_numpy(tokens).to(device), selected)  # (R, V)
        logits = logits.float()
        normalizer = logits.logsumexp(dim=1, keepdim=True)
        logits = logits.index_fill(1, torch.tensor(self._forbidden, device=device, dtype=torch.long), -torch.inf)
        best, words = logits.topk(min(width, logits.shape[1]), dim=1)
        return (best - normalizer).cpu().numpy(), words.cpu().numpy(), state


class Folded(NamedTuple):
    """A decoder's weights for search alone; H is its hidden size, E its embedding size, V its vocabulary."""

    embed_image: Tensor
    """(E, 2048)"""
    image_bias: Tensor
    """(E,)"""
    input: Tensor
    """(4H, E), for the image alone"""
    input_bias: Tensor
    """(4H,)"""
    table: Tensor
    """(V, 4H): what each token adds to the gates, biases included"""
    product: Tensor
    """(4H + V, H): the recurrent weights above the output weights"""
    product_bias: Tensor
    """(4H + V,): zeros above the output's bias"""
    mask: Tensor
    """(V,): -inf for what must not be generated, else 0"""


@torch.inference_mode()
def fold(decoder: Decoder, forbidden: Sequence[int]) -> Folded:
    output = decoder.output
    weights = dict(decoder.lstm.named_parameters())
    bias = weights["bias_ih_l0"] + weights["bias_hh_l0"]
    mask = torch.zeros_like(output.bias)
    mask[list(forbidden)] = -torch.inf
    return Folded(
        embed_image=decoder.embed_image.weight,
        image_bias=decoder.embed_image.bias,
        input=weights["weight_ih_l0"],
        input_bias=bias,
        table=decoder.embed_token.weight @ weights["weight_ih_l0"].T + bias,
        product=torch.cat([weights["weight_hh_l0"], output.weight]),
        product_bias=torch.cat([torch.zeros_like(bias), output.bias]),
        mask=mask,
    )


class FoldedState(NamedTuple):
    recurrent: Any
    """(R, 4H): what the captions so far add to the next gates. Tensor or numpy array, as the expander has it."""
    cell: Any
    """(R, H)"""


class TorchExpander:
    """The folded decoder in torch, on the device where its weights are."""

    def __init__(self, folded: Folded) -> None:
        self._folded = folded
        self._product = folded.product.T.contiguous()

    @torch.inference_mode()
    def start(self, features: Tensor) -> FoldedState:
        folded = self._folded
        image = torch.addmm(folded.image_bias, features, folded.embed_image.T)
        gates = torch.addmm(folded.input_bias, image, folded.input.T)
        hidden, cell = _lstm(gates, features.new_zeros(len(features), gates.shape[1] // 4))
        return FoldedState(hidden @ self._product[:, : gates.shape[1]], cell)

    @torch.inference_mode()
    def expand(
        self, state: FoldedState, rows: np.ndarray, tokens: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray, FoldedState]:
        # One copy to the device, not two.
        row, token = torch.from_numpy(np.stack([rows, tokens])).to(state.cell.device)
        gains, words, state = self.step(state, row, token, width)
        return gains.cpu().numpy(), words.cpu().numpy(), state

    def step(self, state: FoldedState, row: Tensor, token: Tensor, width: int) -> tuple[Tensor, Tensor, FoldedState]:
        """`expand` in tensors on the weights' device."""
        folded = self._folded
        hidden, cell = _lstm(state.recurrent[row] + folded.table[token], state.cell[row])
        recurrent, logits = torch.addmm(folded.product_bias, hidden, self._product).split(
            [folded.table.shape[1], folded.table.shape[0]], dim=1
        )
        best, words = (logits + folded.mask).topk(min(width, len(folded.mask)), dim=1)
        return best - logits.logsumexp(dim=1, keepdim=True), words, FoldedState(recurrent, cell)


def _lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Gates (R, 4H) in torch's order and the old cell (R, H) to the hidden state and the new cell."""
    enter, forget, new, leave = gates.chunk(4, dim=1)
    cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell
