"""The encoder and the step of the search as CUDA graphs (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).

Launched one by one from Python, the kernels of a small batch keep the CPU busy for longer than the GPU. A graph is recorded
once for a size and launched as a whole; less is padded to the next size that there is.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handler.expansion import Folded, FoldedState
from handler.parameters import MAX_BEAM_SIZE
from handler.torch_expansion import TorchExpander

IMAGES = (1, 2, 4, 8, 16)
"""Sizes of the encoder's graphs."""
CAPTIONS = (8, 16, 40, 80, 160)
"""Sizes of the step's graphs: beams of 5 for 1, 3, 8, 16 and 32 images. More at once go without a graph."""


class Recording:
    """Work on tensors that stay where they are. On a GPU it is recorded once, elsewhere it is simply done again."""

    def __init__(self, work: Callable[[], None], device: torch.device, pool: Any) -> None:
        """pool: memory for intermediate results, shared by recordings that are never replayed at the same time."""
        self.replay = work
        if device.type != "cuda":
            return
        # Libraries choose their kernels and set up their memory the first time, which cannot be recorded.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            work()
        self.replay = graph.replay


def memory_pool(device: torch.device) -> Any:
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def staged(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Zeros on the CPU, in memory that the GPU can copy from and to by itself, and on the device."""
    host = torch.zeros(*shape, dtype=dtype, pin_memory=device.type == "cuda")
    return host, torch.zeros(*shape, dtype=dtype, device=device)


class RecordedEncoder:
    """Images to features, recorded for every size of `IMAGES`."""

    def __init__(self, encode: Callable[[Tensor], Tensor], size: int, device: torch.device) -> None:
        """encode: pixels (B, 3, size, size), uint8, to features (B, 2048), float32, on `device`."""
        self._device = device
        self._host, self._pixels = staged((IMAGES[-1], 3, size, size), torch.uint8, device)
        pool = memory_pool(device)
        self._features: dict[int, Tensor] = {}
        # The largest first, so that the others find memory enough in the pool.
        self._recordings = {count: self._record(encode, count, pool) for count in reversed(IMAGES)}

    def _record(self, encode: Callable[[Tensor], Tensor], count: int, pool: Any) -> Recording:
        pixels = self._pixels[:count]
        features = self._features[count] = torch.zeros_like(encode(pixels))

        def work() -> None:
            features.copy_(encode(pixels))

        return Recording(work, self._device, pool)

    def encode(self, images: Tensor) -> Tensor:
        """Pixels (B, 3, size, size), uint8, on the CPU, to features (B, 2048), float32."""
        return torch.cat([self._encode(part) for part in images.split(IMAGES[-1])])

    def _encode(self, images: Tensor) -> Tensor:
        count = len(images)
        size = IMAGES[bisect.bisect_left(IMAGES, count)]
        self._host[:count].copy_(images)
        self._pixels[:count].copy_(self._host[:count], non_blocking=True)
        self._recordings[size].replay()
        features = self._features[size][:count].clone()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # the next images go to the same place
        return features


class RecordedExpander:
    """`TorchExpander` with its step recorded for every size of `CAPTIONS`."""

    def __init__(self, folded: Folded[np.ndarray], device: torch.device | str = "cpu") -> None:
        self._plain = TorchExpander(folded, device)
        table = self._plain.folded.table
        self.device = table.device
        gates, hidden = folded.table.shape[1], folded.product.shape[1]
        self._state = FoldedState(table.new_zeros(CAPTIONS[-1], gates), table.new_zeros(CAPTIONS[-1], hidden))
        self._width = min(MAX_BEAM_SIZE, len(folded.mask))
        pool = memory_pool(self.device)
        self._steps = {count: _Step(self._plain, self._state, count, self._width, pool) for count in reversed(CAPTIONS)}

    def start(self, features: np.ndarray) -> FoldedState[Tensor]:
        return self._plain.start(features)

    @torch.inference_mode()
    def expand(
        self, state: FoldedState[Tensor], rows: np.ndarray, tokens: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray, FoldedState[Tensor]]:
        count = len(rows)
        if count > CAPTIONS[-1]:
            return self._plain.expand(state, rows, tokens, width)
        if state.cell is not self._state.cell:  # from `start`, or from a step with too many captions for a graph
            row = torch.from_numpy(rows).to(self.device)
            for ours, theirs in zip(self._state, state, strict=True):
                ours[:count] = theirs[row]
            rows = np.arange(count)
        step = self._steps[CAPTIONS[bisect.bisect_left(CAPTIONS, count)]]
        gains, words = step.run(rows, tokens)
        return gains[:count, :width], words[:count, :width], self._state


class _Step:
    """One step for `count` captions, of which some are padding. It overwrites the state with the new one."""

    def __init__(self, expander: TorchExpander, state: FoldedState[Tensor], count: int, width: int, pool: Any) -> None:
        device = state.cell.device
        self._device = device
        self._host_indices, self._indices = staged((2, count), torch.int64, device)
        # One copy brings both: the words are in it bit by bit.
        self._host_found, self._found = staged((2, count, width), torch.float32, device)

        def work() -> None:
            gains, words, new = expander.step(state, self._indices[0], self._indices[1], width)
            self._found[0] = gains
            self._found[1].view(torch.int32).copy_(words)
            for old, replacement in zip(state, new, strict=True):
                old[:count] = replacement

        with torch.inference_mode():
            self._recording = Recording(work, device, pool)

    def run(self, rows: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indices = self._host_indices.numpy()
        indices[:, len(rows) :] = 0
        indices[0, : len(rows)], indices[1, : len(rows)] = rows, tokens
        self._indices.copy_(self._host_indices, non_blocking=True)
        self._recording.replay()
        self._host_found.copy_(self._found, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        gains, words = self._host_found.numpy().copy()
        return gains, words.view(np.int32)
