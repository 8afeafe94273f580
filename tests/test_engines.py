"""The engines are one model: what they caption differently would depend on the machine that serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from handler.captioner import Captioner
from handler.checkpoint import load_checkpoint
from scripts.datasets import Example
from scripts.engines import REFERENCE, as_markdown, captioners, compare
from tests.conftest import ROOT, SAMPLES


@pytest.mark.slow
def test_fp32_engines_give_the_same_captions_and_likelihoods(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    examples = [Example(path, ("a photo of something",), "dev") for path in SAMPLES]

    reference, other = compare(captioners(ROOT / "weights/en", tmp_path, (REFERENCE, "openvino-fp32")), examples)

    assert (reference.engine, other.engine) == (REFERENCE, "openvino-fp32")
    assert other.same == other.photos == len(SAMPLES)
    assert other.difference < 1e-3
    assert 0 < reference.kept <= len(SAMPLES)
    assert "| openvino-fp32 |" in as_markdown([reference, other])


def test_captions_that_differ_are_counted() -> None:
    captioner = Captioner(load_checkpoint(ROOT / "weights/en"))
    short = Captioner(load_checkpoint(ROOT / "weights/zh"))
    examples = [Example(SAMPLES[0], ("a photo of something",), "dev")]

    _, other = compare({REFERENCE: captioner, "openvino-fp32": short}, examples)

    assert (other.photos, other.same) == (1, 0)
