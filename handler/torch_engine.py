"""The encoder in torch (`handler.engine`): on GPUs, and on CPUs where OpenVINO does not serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from handler.config import PreprocessingConfig
from handler.encoder import Encoder, fused
from handler.engine import is_gpu
from handler.image import mean_and_std, normalize
from handler.networks import load_encoder

DTYPES = {"torch-fp32": torch.float32, "torch-bf16": torch.bfloat16, "torch-fp16": torch.float16}


class TorchEngine:
    """The checkpoint's own weights, on any device."""

    def __init__(
        self,
        encoder: Encoder,
        preprocessing: PreprocessingConfig,
        *,
        name: str,
        device: str = "cpu",
        recorded: bool = False,
    ) -> None:
        """recorded: as a CUDA graph and without batch norms, which takes a moment and some of the GPU's memory."""
        self.name = name
        self.device = device
        self._device = torch.device(device)
        self._preprocessing = preprocessing
        self._constants = mean_and_std(preprocessing, self._device)  # a graph can take nothing from the CPU
        self._dtype = DTYPES[name]
        if self._device.type == "cuda":
            # Where fp32 was asked for, convolutions should not round their inputs to 10 bits.
            torch.backends.cudnn.allow_tf32 = self._dtype != torch.float32
        encoder = fused(encoder) if recorded else encoder
        # The layout that bf16 and fp16 convolutions are fast in.
        self._encoder = encoder.to(self._device, self._dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._encode: Callable[[Tensor], Tensor] = self._launch
        if recorded:
            from handler.cuda_graphs import RecordedEncoder

            self._encode = RecordedEncoder(self._launch, preprocessing.size, self._device).encode

    def encode(self, images: np.ndarray) -> np.ndarray:
        return self._encode(torch.from_numpy(images)).cpu().numpy()

    @torch.inference_mode()
    def _launch(self, images: Tensor) -> Tensor:
        batch = normalize(images.to(self._device), self._preprocessing, self._constants).to(self._dtype)
        return self._encoder(batch.contiguous(memory_format=torch.channels_last)).float()


def load_torch_engine(
    checkpoint: Path, preprocessing: PreprocessingConfig, *, name: str, device: str, threads: int
) -> TorchEngine:
    """Raises CheckpointError."""
    torch.set_num_threads(threads)
    if is_gpu(device):
        torch.cuda.set_device(torch.device(device).index or 0)  # or each worker would take memory of the first GPU too
    return TorchEngine(load_encoder(checkpoint), preprocessing, name=name, device=device, recorded=is_gpu(device))
