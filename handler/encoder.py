"""ResNet50 without its classifier (He et al. 2016, "Deep Residual Learning for Image Recognition")."""

from __future__ import annotations

import copy
from typing import cast

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from handler.config import EncoderConfig

FEATURE_SIZE = 2048
CAFFE_BATCH_NORM_EPS = 2e-5


class Encoder(nn.Module):
    """Photos to features.

    Parameter names are torchvision's `resnet50` names without `fc`, so its weight files fit as they are.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        from handler.torchvision_models import models  # takes a second, which a worker whose encoder is exported saves

        resnet = models.resnet50()
        if config.architecture == "resnet50-caffe":
            _as_in_caffe(resnet)
        for name, child in resnet.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, child)

    def feature_map(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to a grid of features (B, 2048, ceil(H / 32), ceil(W / 32))."""
        for stage in self.children():
            images = stage(images)
        return images

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to pooled features (B, 2048)."""
        return self.feature_map(images).mean((2, 3))


def blocks(encoder: Encoder) -> list[str]:
    """The names of the residual blocks, in the order of computation."""
    from handler.torchvision_models import models

    return [name for name, module in encoder.named_modules() if isinstance(module, models.resnet.Bottleneck)]


def fused(encoder: Encoder) -> Encoder:
    """A copy whose convolutions do what their batch norms did."""
    encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
    pairs = [("", "conv1", "bn1")]
    for block in blocks(encoder):
        pairs += [(block, f"conv{n}", f"bn{n}") for n in (1, 2, 3)]
        if encoder.get_submodule(block).downsample is not None:
            pairs.append((f"{block}.downsample", "0", "1"))
    for place, convolution, norm in pairs:
        module = encoder.get_submodule(place)
        parts = module.get_submodule(convolution), module.get_submodule(norm)
        setattr(module, convolution, fuse_conv_bn_eval(*cast(tuple[nn.Conv2d, nn.BatchNorm2d], parts)))
        setattr(module, norm, nn.Identity())
    return encoder


def _as_in_caffe(resnet: nn.Module) -> None:
    """Turn torchvision's v1.5 into the v1 network of Caffe and chainer-caption, in place."""
    from handler.torchvision_models import models

    resnet.maxpool = nn.MaxPool2d(3, stride=2, padding=0, ceil_mode=True)
    for block in resnet.modules():
        if isinstance(block, models.resnet.Bottleneck) and block.stride != 1:
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
        if isinstance(block, nn.BatchNorm2d):
            block.eps = CAFFE_BATCH_NORM_EPS
