"""The two ResNet50 variants."""

from __future__ import annotations

import torch
from torch import nn

from handler.config import EncoderConfig
from handler.encoder import Encoder
from handler.torchvision_models import models


def test_it_is_torchvisions_resnet50_without_the_classifier() -> None:
    torch.manual_seed(0)
    resnet = models.resnet50().eval()
    encoder = Encoder(EncoderConfig()).eval()
    weights = {name: value for name, value in resnet.state_dict().items() if not name.startswith("fc.")}
    encoder.load_state_dict(weights)  # the same names
    resnet.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images), resnet(images))
        assert encoder.feature_map(images).shape == (2, 2048, 2, 3)


def test_the_caffe_variant_strides_on_the_first_convolution_and_pools_in_ceil_mode() -> None:
    encoder = Encoder(EncoderConfig(architecture="resnet50-caffe"))
    block = encoder.get_submodule("layer2.0")
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
    assert {m.eps for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)} == {2e-5}
    pool = encoder.get_submodule("maxpool")
    assert pool(torch.zeros(1, 1, 112, 112)).shape[-2:] == (56, 56)
    assert (
        float(pool(-torch.ones(1, 1, 4, 4)).max()) == -1
    )  # padding would not show, but a window without padding must be inside
    assert pool.padding == 0
