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


class _TensorFlowSame(nn.Module):
    """A stride-2 convolution padded as TensorFlow's "SAME" does: one pixel right and bottom."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution
        convolution.padding = (0, 0)

    def forward(self, images: Tensor) -> Tensor:
        return self.convolution(F.pad(images, (0, 1, 0, 1)))


class MobileNetV2Teacher(nn.Module):
    """MobileNetV2 (Sandler et al. 2018) with ImageNet weights from TensorFlow, in torchvision's names."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.net = models.mobilenet_v2(num_classes=CLASSES)
        weights = {name: value.float() for name, value in load_file(path).items()}
        missing, unexpected = self.net.load_state_dict(weights, strict=False)
        if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
            raise ValueError(f"{path} does not hold a MobileNetV2: missing {missing[:3]}, unexpected {unexpected[:3]}")
        for parent in list(self.net.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Conv2d) and child.stride == (2, 2):
                    setattr(parent, name, _TensorFlowSame(child))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in 0..1 to features (B, 1280, H / 32, W / 32) and class log-probabilities (B, 1001)."""
        grid = self.net.features((images * 2 - 1).contiguous(memory_format=torch.channels_last)).float()
        with torch.autocast(images.device.type, enabled=False):
            return grid, F.log_softmax(self.net.classifier(grid.mean((2, 3))), dim=1)
