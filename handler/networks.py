"""A checkpoint's networks in torch, filled with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from handler.checkpoint import read_manifest, read_weights, verified
from handler.config import DecoderConfig
from handler.decoder import Decoder
from handler.encoder import Encoder


def load_encoder(directory: Path) -> Encoder:
    """Read and verify the encoder of a checkpoint. Raises CheckpointError."""
    manifest = read_manifest(directory)
    path = verified(directory, manifest.files["encoder"])
    with torch.device("meta"), _NoInitialWeights():
        encoder = Encoder(manifest.config.encoder)
    load_weights(encoder, path)
    return encoder.eval()


def decoder_of(config: DecoderConfig, weights: Mapping[str, np.ndarray]) -> Decoder:
    """The decoder with these weights, in evaluation mode. It shares their memory."""
    with torch.device("meta"), _NoInitialWeights():
        decoder = Decoder(config)
    decoder.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, assign=True)
    return decoder.requires_grad_(True).eval()


def weights_of(module: nn.Module) -> dict[str, np.ndarray]:
    """The weights of a network by name, in float32; on the CPU they share its memory."""
    return {name: value.detach().float().cpu().numpy() for name, value in module.state_dict().items()}


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill `module` with the weights of a safetensors file, as fp32; every name and shape must fit. Raises CheckpointError."""
    state = module.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items() if value.is_floating_point()}
    floats = {name: torch.from_numpy(value) for name, value in read_weights(path, shapes).items()}
    counters = {name: torch.zeros_like(value, device="cpu") for name, value in state.items() if name not in shapes}
    module.load_state_dict(floats | counters, assign=True)
    module.requires_grad_(True)


class _NoInitialWeights(TorchFunctionMode):
    """Modules are made without random weights. On the meta device they would take no time but a second for imports."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
