"""Round a ResNet50's weights to int8 so that its features stay what they are.

Rounding each weight to the nearest of its channel's 255 values ruins an encoder whose channels have a few large weights
and many small ones that matter together. GPTQ (Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", after Hassibi and Stork's optimal brain surgeon) rounds one input of a convolution after the
other and lets the inputs not yet rounded make up for the error, as far as calibration photos show them to go together. The
bias takes the mean error, that of the convolutions before included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from handler.encoder import Encoder, blocks, fused

LEVELS = 127
"""A channel's weights are whole multiples, -127 to 127, of its greatest by 127."""
DAMPING = 0.01
"""Added to the variance of each input, as a share of their mean: what few photos do not show is not relied on."""
POSITIONS = 8_000
"""Of the calibration photos' feature maps, at which a convolution's inputs are looked at."""
BLOCK = 128
"""Inputs whose errors are passed on together to all after them."""
BATCH = 16


class Activations(NamedTuple):
    """The same photos on their way through both networks, in batches (B, C, h, w)."""

    rounded: list[Tensor]
    exact: list[Tensor]

    def through(self, layer: Callable[[Tensor], Tensor]) -> Activations:
        return Activations([layer(x) for x in self.rounded], [layer(x) for x in self.exact])

    def plus(self, other: Activations) -> Activations:
        rounded = [a + b for a, b in zip(self.rounded, other.rounded, strict=True)]
        return Activations(rounded, [a + b for a, b in zip(self.exact, other.exact, strict=True)])


@torch.inference_mode()
def rounded_to_int8(encoder: Encoder, images: Tensor) -> Encoder:
    """A copy with its batch norms in the convolutions, and with weights that int8 holds without error.

    images: normalised calibration photos (N, 3, size, size); some hundred.
    """
    exact = fused(encoder)
    equalize(exact, images)
    rounded = copy.deepcopy(exact)
    names = [name for name, module in exact.named_modules() if isinstance(module, nn.Conv2d)]
    with tqdm(total=len(names), desc="rounding", unit="convolution", leave=False) as bar:

        def round_layer(name: str, activations: Activations) -> Activations:
            ours, theirs = (cast(nn.Conv2d, network.get_submodule(name)) for network in (rounded, exact))
            round_convolution(ours, theirs, activations)
            bar.update()
            return Activations([ours(x) for x in activations.rounded], [theirs(x) for x in activations.exact])

        batches = list(images.split(BATCH))
        activations = round_layer("conv1", Activations(batches, batches)).through(torch.relu)
        activations = activations.through(exact.get_submodule("maxpool"))
        for block in blocks(exact):
            shortcut = round_layer(f"{block}.downsample.0", activations) if f"{block}.downsample.0" in names else activations
            activations = round_layer(f"{block}.conv1", activations).through(torch.relu)
            activations = round_layer(f"{block}.conv2", activations).through(torch.relu)
            activations = round_layer(f"{block}.conv3", activations).plus(shortcut).through(torch.relu)
    return rounded


def equalize(encoder: Encoder, images: Tensor) -> None:
    """Scale the channels within each block to the same greatest activation, which changes nothing that it computes.

    Activations are quantized by one scale for all channels of a convolution's input (Nagel et al. 2019, "Data-Free Quantization
    Through Weight Equalization and Bias Correction"; here the ranges are those that photos show).
    """
    greatest: dict[nn.Module, Tensor] = {}

    def record(convolution: nn.Module, inputs: tuple[Tensor]) -> None:
        found = inputs[0].amax((0, 2, 3))
        greatest[convolution] = torch.maximum(greatest.get(convolution, found), found)

    pairs = [
        [cast(nn.Conv2d, encoder.get_submodule(f"{block}.conv{n}")) for n in (first, first + 1)]
        for block in blocks(encoder)
        for first in (1, 2)
    ]
    hooks = [after.register_forward_pre_hook(record) for _, after in pairs]
    for batch in images.split(BATCH):
        encoder(batch)
    for hook in hooks:
        hook.remove()
    for before, after in pairs:
        scale = greatest[after]
        scale = torch.where(scale > 0, scale, 1.0)  # a channel that is never active
        before.weight /= scale.view(-1, 1, 1, 1)
        cast(Tensor, before.bias).div_(scale)
        after.weight *= scale.view(1, -1, 1, 1)


def round_convolution(ours: nn.Conv2d, theirs: nn.Conv2d, activations: Activations) -> None:
    """Round the weights of `ours` in place, for the inputs that it gets, so that it gives what `theirs` gives."""
    inputs, wanted = _patches(theirs, activations)
    mean, wanted_mean = inputs.mean(1), wanted.mean(1)
    centred = inputs - mean[:, None]
    weight = gptq(ours.weight.flatten(1), centred @ centred.T / inputs.shape[1])
    ours.weight.copy_(weight.view_as(ours.weight))
    cast(Tensor, ours.bias).copy_(cast(Tensor, theirs.bias) + theirs.weight.flatten(1) @ wanted_mean - weight @ mean)


def gptq(weight: Tensor, covariance: Tensor) -> Tensor:
    """Weights (O, K) of inputs with the given covariance (K, K), each row rounded to multiples of its greatest by 127.

    The greatest itself stays, so that whoever looks for the row's scale finds the same.
    """
    covariance = covariance.double()
    covariance.diagonal().add_(DAMPING * covariance.diagonal().mean().clamp(min=1e-12))
    order = covariance.diagonal().argsort(descending=True)  # those that matter most while most can make up for them
    weight, covariance = weight[:, order], covariance[order][:, order]
    # Row k of U: how an error of input k is best made up for by those after it.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    upper = torch.linalg.cholesky(inverse, upper=True).to(weight.dtype)
    greatest = weight.abs().argmax(1)
    scale = weight.abs().amax(1) / LEVELS
    scale = torch.where(scale > 0, scale, 1.0)
    fixed = F.one_hot(greatest, weight.shape[1]).bool()
    rounded, left = weight.clone(), weight.clone()
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        errors = torch.zeros(len(weight), stop - start, dtype=weight.dtype)
        for k in range(start, stop):
            nearest = (left[:, k] / scale).round().clamp(-LEVELS, LEVELS) * scale
            rounded[:, k] = torch.where(fixed[:, k], weight[:, k], nearest)
            errors[:, k - start] = (left[:, k] - rounded[:, k]) / upper[k, k]
            left[:, k:stop] -= errors[:, k - start, None] * upper[k, k:stop]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return rounded[:, order.argsort()]


def _patches(convolution: nn.Conv2d, activations: Activations) -> tuple[Tensor, Tensor]:
    """What the convolution is applied to at some positions, the same in both networks: (K, POSITIONS) each."""
    generator = torch.Generator().manual_seed(0)
    share = POSITIONS / sum(len(x) for x in activations.exact)
    found: tuple[list[Tensor], list[Tensor]] = [], []
    for batch in zip(*activations, strict=True):
        one, other = (
            F.unfold(x, cast(int, convolution.kernel_size), padding=cast(int, convolution.padding), stride=convolution.stride)
            for x in batch
        )  # (B, K, L)
        some = torch.randperm(one.shape[0] * one.shape[2], generator=generator)[: round(share * len(one)) + 1]
        for patches, kept in zip((one, other), found, strict=True):
            kept.append(patches.transpose(0, 1).flatten(1)[:, some])
    return torch.cat(found[0], 1), torch.cat(found[1], 1)
