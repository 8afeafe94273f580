"""Weights rounded to int8 give the features that they gave."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from handler.checkpoint import Checkpoint
from handler.config import EncoderConfig
from handler.encoder import Encoder, blocks, fused
from scripts.gptq import LEVELS, equalize, gptq, rounded_to_int8


def nearest(weight: Tensor) -> Tensor:
    scale = weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.ndim - 1)) / LEVELS
    return (weight / scale).round() * scale


def error(weight: Tensor, rounded: Tensor, covariance: Tensor) -> Tensor:
    """Mean squared error (O,) of what comes out."""
    difference = weight - rounded
    return ((difference @ covariance) * difference).sum(1)


def correlated(inputs: int, factors: int = 3) -> tuple[Tensor, Tensor]:
    """Random weights (8, inputs), some large, and the covariance of inputs that go together."""
    torch.manual_seed(inputs)
    weight = torch.randn(8, inputs) * 10 ** torch.empty(8, inputs).uniform_(-3, 0)
    signals = torch.randn(inputs, factors) @ torch.randn(factors, 4 * inputs) + 0.1 * torch.randn(inputs, 4 * inputs)
    return weight, signals @ signals.T / signals.shape[1]


@pytest.mark.parametrize("inputs", [3, 130, 300])
def test_weights_are_whole_multiples_and_the_greatest_stays(inputs: int) -> None:
    """NNCF takes the scale from the greatest; were it another, it would round once more. 130: more than one block."""
    weight, covariance = correlated(inputs)
    rounded = gptq(weight, covariance)
    scale = weight.abs().amax(1, keepdim=True) / LEVELS
    torch.testing.assert_close(rounded.abs().amax(1), weight.abs().amax(1))
    torch.testing.assert_close(rounded / scale, (rounded / scale).round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("inputs", [130, 300])
def test_inputs_make_up_for_the_errors_of_others(inputs: int) -> None:
    weight, covariance = correlated(inputs)
    assert float((error(weight, gptq(weight, covariance), covariance) / error(weight, nearest(weight), covariance)).max()) < 0.1


def test_rounding_is_near_the_best_that_there_is() -> None:
    """Against all ways to round four weights up or down, the greatest left as it is."""
    weight, covariance = correlated(4, factors=2)
    scale = weight.abs().amax(1, keepdim=True) / LEVELS
    floors = (weight / scale + 1e-4).floor()
    ways = [floors + torch.tensor(way) for way in itertools.product((-1.0, 0.0, 1.0, 2.0), repeat=4)]
    best = torch.stack([error(weight, way * scale, covariance) for way in ways]).amin(0)
    found, plain = error(weight, gptq(weight, covariance), covariance), error(weight, nearest(weight), covariance)
    assert float((found / best).median()) < 5
    assert float(found.sum()) < float(plain.sum())


def test_fusing_and_equalizing_change_no_feature(checkpoint: Checkpoint) -> None:
    assert checkpoint.encoder is not None
    images = torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        encoder = fused(checkpoint.encoder)
        equalize(encoder, images)
        expected = checkpoint.encoder(images)
        torch.testing.assert_close(encoder(images), expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())


@pytest.mark.parametrize("architecture", ["resnet50-torchvision", "resnet50-caffe"])
def test_an_encoder_with_a_few_large_weights_keeps_its_features(architecture: str) -> None:
    """As in the embedded one, whose 3x3 convolutions hold what were single kernels. Rounding each weight ruins it."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig.model_validate({"architecture": architecture})).eval()
    images = torch.randn(8, 3, 64, 64)
    with torch.inference_mode():
        for block in blocks(encoder):
            weight = encoder.get_parameter(f"{block}.conv2.weight")
            channels = torch.arange(len(weight))
            weight[channels, channels, 1, 1] *= 40
        expected = encoder(images)
        plain = fused(encoder)
        for module in plain.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(nearest(module.weight))
        lost = [float((found(images) - expected).norm()) for found in (rounded_to_int8(encoder, images), plain)]
    assert lost[0] < 0.5 * lost[1]
