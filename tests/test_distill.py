"""Distillation: teacher and student see the same crop, a run goes on where it stopped, and what it learns is the encoder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from handler.config import EncoderConfig
from handler.encoder import Encoder
from handler.networks import load_weights
from scripts.datasets import Example
from scripts.distill import augment, concept_words
from scripts.teachers import FEATURES, MobileNetV2Teacher
from scripts.toy_dataset import make
from tests.conftest import ROOT


def test_a_teacher_gives_streams_on_four_grids_and_class_probabilities(mobilenet: Path) -> None:
    teacher = MobileNetV2Teacher(mobilenet)
    streams, classes = teacher(torch.rand(2, 3, 96, 64))
    assert [stream.shape for stream in streams] == [(2, 24, 24, 16), (2, 32, 12, 8), (2, 96, 6, 4), (2, FEATURES, 3, 2)]
    assert classes.exp().sum(1) == pytest.approx(torch.ones(2))
    assert teacher.classify(streams[-1].mean((2, 3))) == pytest.approx(classes)


def test_a_foreign_file_is_no_teacher(tmp_path: Path) -> None:
    save_file({"some.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold a MobileNetV2"):
        MobileNetV2Teacher(tmp_path / "other.safetensors")


def test_crops_are_of_the_size_wanted_and_of_the_photo() -> None:
    torch.manual_seed(0)
    photos = torch.zeros(8, 3, 40, 40)
    photos[:, 0] = 1  # red
    crops = augment(photos, 32)
    assert crops.shape == (8, 3, 32, 32)
    assert (crops[:, 0] > 0.6).all()
    assert (crops[:, 1:] < 0.1).all()


def test_a_word_of_two_captions_counts_more_than_a_word_of_one() -> None:
    examples = [Example(Path("x"), ("A dog in the snow.", "the dog runs"))] * 12
    words, targets = concept_words(examples)
    assert set(words) == {"dog", "snow", "runs"}
    assert targets[0].tolist() == [{"dog": 1.0}.get(word, 0.5) for word in words]


@pytest.mark.slow
def test_a_run_ends_resumes_and_leaves_an_encoder(tmp_path: Path, mobilenet: Path) -> None:
    table = make(tmp_path / "toy", photos=40)

    def distil(minutes: float) -> str:
        command = [
            *(sys.executable, "-m", "scripts.distill", str(tmp_path / "run"), "--images", str(tmp_path / "toy/photos")),
            *("--captions", str(table), "--teacher", str(mobilenet), "--minutes", str(minutes), "--pixels", "32"),
            *("--teacher-pixels", "32", "--photo-size", "48", "--batch", "4"),
        ]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    distil(0.05)
    encoder = Encoder(EncoderConfig())
    load_weights(encoder, tmp_path / "run/encoder.safetensors")
    first = load_file(tmp_path / "run/encoder.safetensors")
    again = distil(0.1)
    assert "continuing after" in again
    held_out = json.loads(next(line for line in again.splitlines() if line.startswith("held out:"))[10:].replace("'", '"'))
    assert set(held_out) == {"cosine", "words@5"}
    second = load_file(tmp_path / "run/encoder.safetensors")
    assert not torch.equal(first["conv1.weight"], second["conv1.weight"])
