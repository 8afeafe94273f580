"""What a MobileNetV2 knows, put into a ResNet50: nothing is lost where there is room, and training begins from it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from handler.config import EncoderConfig
from handler.encoder import Encoder
from handler.networks import load_weights
from handler.torchvision_models import models
from scripts.teachers import FEATURES, MobileNetV2Teacher
from scripts.toy_dataset import make
from scripts.transplant import Hidden, Reader, _choose, _fill, calibrate
from tests.conftest import ROOT


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_with_room_for_all_hidden_channels_computes_what_the_teachers_does(mobilenet: Path, stride: int) -> None:
    """Were a kernel copied the wrong way round, or a bias left out, this would not come out exactly."""
    torch.manual_seed(0)
    teacher = MobileNetV2Teacher(mobilenet).net.features[7 if stride == 2 else 6]  # 192 hidden channels, 32 in
    stream = torch.randn(16, 32, 16, 16)
    target = teacher(stream)
    width, channels = 256, 1024
    downsample = nn.Sequential(nn.Conv2d(64, channels, 1, 2, bias=False), nn.BatchNorm2d(channels)) if stride == 2 else None
    block = models.resnet.Bottleneck(64 if downsample else channels, width, stride, downsample).eval()
    student = torch.zeros(16, block.conv1.in_channels, 16, 16)
    student[:, :32] = stream + 9  # lifted, as it is in the student
    weight = torch.zeros(32, block.conv1.in_channels)
    weight[:, :32] = torch.eye(32)
    reader = Reader(weight, torch.full((32,), -9.0))
    lift = torch.full((target.shape[1],), 9.0) if downsample else None
    explained = _fill(block, Hidden.of([teacher]), reader, student, target, first=0, lift=lift)
    assert explained > 0.999
    found = block(student)[:, : target.shape[1]] - 9
    assert (found - target).square().mean() < 1e-3 * target.var()


def test_the_columns_chosen_are_those_that_explain_the_outputs() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(500, 40)
    outputs = inputs[:, [3, 17, 31]] @ torch.randn(3, 8)
    assert _choose(inputs, outputs, 3).tolist() == [3, 17, 31]


@torch.no_grad()
def test_an_encoder_computes_the_same_with_statistics_of_its_own() -> None:
    """Otherwise training, which normalises with the batch's statistics, would begin from another network."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig()).eval()
    images = torch.randn(4, 3, 64, 64)
    before = encoder(images)
    calibrate(encoder, [images])
    assert encoder(images) == pytest.approx(before, abs=1e-3 * before.abs().max().item())
    assert encoder.get_submodule("bn1").running_mean.abs().max() > 1e-3  # type: ignore[operator, union-attr]
    # and as it is trained
    assert encoder.train()(images) == pytest.approx(before, abs=2e-2 * before.abs().max().item())


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on_with_its_stage_and_leaves_an_encoder(tmp_path: Path, mobilenet: Path) -> None:
    table = make(tmp_path / "toy", photos=10)
    command = [
        *(sys.executable, "-m", "scripts.transplant", str(tmp_path / "run")),
        *("--images", str(tmp_path / "toy/photos"), "--captions", str(table), "--teacher", str(mobilenet)),
        *("--pixels", "64", "--crops", "16", "--stage-pixels", "32", "--stage-steps", "7", "--stage-batch", "4"),
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as begun:
        assert begun.stdout is not None
        while "layer3: blocks" not in begun.stdout.readline():
            assert begun.poll() is None
        begun.kill()
    assert not (tmp_path / "run/encoder.safetensors").exists()
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "continuing after layer2" in out
    assert re.findall(r"^(layer\d): trained", out, re.MULTILINE) == ["layer3", "layer4"]
    encoder = Encoder(EncoderConfig())
    load_weights(encoder, tmp_path / "run/encoder.safetensors")
    features = encoder.eval()(torch.randn(2, 3, 64, 64))
    assert features.isfinite().all()
    assert features[:, :FEATURES].var() > 0


def test_a_foreign_teacher_is_refused_with_a_message(tmp_path: Path) -> None:
    table = make(tmp_path / "toy", photos=5)
    (tmp_path / "teacher.safetensors").write_bytes(b"no weights")
    command = [sys.executable, "-m", "scripts.transplant", str(tmp_path / "run"), "--images", str(tmp_path / "toy/photos")]
    command += ["--captions", str(table), "--teacher", str(tmp_path / "teacher.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
