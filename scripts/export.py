"""Export a checkpoint's encoder for OpenVINO, quantized if asked: `python -m scripts.export --help`.

`scripts.package_mar` calls this, so that a cold start converts nothing. The float export serves as bf16 or fp32, whichever
the CPU has. The int8 one needs photos like those that will be captioned, and is kept only if the captions stay good.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from handler.checkpoint import load_encoder, read_manifest, sha256
from handler.config import PreprocessingConfig
from handler.encoder import Encoder
from handler.engine import EXPORT_MANIFEST, ExportManifest, Numbers
from handler.image import normalize

FILES = ("encoder.xml", "encoder.bin")


class _WithPreprocessing(nn.Module):
    def __init__(self, encoder: Encoder, preprocessing: PreprocessingConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.preprocessing = preprocessing

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(normalize(images, self.preprocessing))


def can_export() -> bool:
    return importlib.util.find_spec("openvino") is not None


def exporter() -> str:
    """What the exported files depend on beside the checkpoint."""
    return f"openvino {importlib.metadata.version('openvino')}, torch {torch.__version__}" if can_export() else "none"
