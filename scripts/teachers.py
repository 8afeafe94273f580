"""Teacher networks for the distillation of the encoder (`scripts.distill`)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from handler.torchvision_models import models

CLASSES = 1001
FEATURES = 1280
STREAMS = {3: 24, 6: 32, 13: 96, 18: FEATURES}
"""The last of torchvision's `features` of each grid from H / 4 on, and its channels."""


class MobileNetV2Teacher(nn.Module):
    """MobileNetV2 (Sandler et al. 2018) with ImageNet weights, in torchvision's names.

    Weights from TensorFlow serve as well, although its strided convolutions pad at the right and bottom alone: what each
    place of the grid looks at moves, what it sees there does not. Padded on all sides it looks where a ResNet does.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.net = models.mobilenet_v2(num_classes=CLASSES)
        weights = {name: value.float() for name, value in load_file(path).items()}
        missing, unexpected = self.net.load_state_dict(weights, strict=False)
        if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
            raise ValueError(f"{path} does not hold a MobileNetV2: missing {missing[:3]}, unexpected {unexpected[:3]}")
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images (B, 3, H, W) in 0..1 to the streams before each halving of the grid, and class log-probabilities (B, 1001).

        Streams are (B, 24, H / 4, W / 4), (B, 32, H / 8, W / 8), (B, 96, H / 16, W / 16) and the features
        (B, 1280, H / 32, W / 32).
        """
        grid, streams = (images * 2 - 1).contiguous(memory_format=torch.channels_last), []
        for number, block in enumerate(self.net.features):
            grid = block(grid)
            if number in STREAMS:
                streams.append(grid.float())
        return streams, self.classify(streams[-1].mean((2, 3)))

    def classify(self, features: Tensor) -> Tensor:
        """Pooled features (B, 1280), a student's for instance, to class log-probabilities (B, 1001)."""
        with torch.autocast(features.device.type, enabled=False):
            return F.log_softmax(self.net.classifier(features), dim=1)
