"""The step of the search (`handler.expansion`) in torch: as the decoder was trained, and folded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from handler.decoder import DecoderState
from handler.expansion import Folded, FoldedState


class StepDecoder(Protocol):
    """What `PlainExpander` needs of a decoder; see `handler.decoder.Decoder`."""

    def start(self, features: Tensor) -> DecoderState: ...

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]: ...


class PlainExpander:
    """Any decoder that makes steps, as it is."""

    def __init__(self, decoder: StepDecoder, forbidden: Sequence[int], device: torch.device | str = "cpu") -> None:
        """device: where the decoder is."""
        self._decoder = decoder
        self._forbidden = list(forbidden)
        self._device = device

    @torch.inference_mode()
    def start(self, features: np.ndarray) -> DecoderState:
        return self._decoder.start(torch.from_numpy(features).to(self._device))

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


class TorchExpander:
    """The folded decoder in torch, on any device."""

    def __init__(self, folded: Folded[np.ndarray], device: torch.device | str = "cpu") -> None:
        self.folded: Folded[Tensor] = Folded._make(torch.from_numpy(values).to(device) for values in folded)
        self._product = self.folded.product.T.contiguous()

    @torch.inference_mode()
    def start(self, features: np.ndarray) -> FoldedState[Tensor]:
        folded = self.folded
        inputs = torch.from_numpy(features).to(folded.table.device)
        image = torch.addmm(folded.image_bias, inputs, folded.embed_image.T)
        gates = torch.addmm(folded.input_bias, image, folded.input.T)
        hidden, cell = _lstm(gates, inputs.new_zeros(len(inputs), gates.shape[1] // 4))
        return FoldedState(hidden @ self._product[:, : gates.shape[1]], cell)

    @torch.inference_mode()
    def expand(
        self, state: FoldedState[Tensor], rows: np.ndarray, tokens: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray, FoldedState[Tensor]]:
        # One copy to the device, not two.
        row, token = torch.from_numpy(np.stack([rows, tokens])).to(state.cell.device)
        gains, words, state = self.step(state, row, token, width)
        return gains.cpu().numpy(), words.cpu().numpy(), state

    def step(
        self, state: FoldedState[Tensor], row: Tensor, token: Tensor, width: int
    ) -> tuple[Tensor, Tensor, FoldedState[Tensor]]:
        """`expand` in tensors on the weights' device."""
        folded = self.folded
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
