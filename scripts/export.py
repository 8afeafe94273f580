"""Export a checkpoint's encoder for OpenVINO. `scripts.package_mar` packs it, so that a cold start converts nothing.

The float export serves as bf16 or fp32, whichever the CPU has instructions for; `scripts.quantize` makes the int8 one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handler.checkpoint import read_manifest, sha256
from handler.config import PreprocessingConfig
from handler.encoder import Encoder
from handler.engine import EXPORT_MANIFEST, ExportManifest, read_export
from handler.image import normalize
from handler.networks import load_encoder

NOTHING = "none"
FILES = ("encoder.xml", "encoder.bin")


class _WithPreprocessing(nn.Module):
    def __init__(self, encoder: Encoder, preprocessing: PreprocessingConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.preprocessing = preprocessing

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(normalize(images, self.preprocessing))


def exporter() -> str:
    """What the exported files depend on beside the checkpoint; NOTHING where nothing can be exported."""
    if importlib.util.find_spec("openvino") is None:
        return NOTHING
    return f"openvino {importlib.metadata.version('openvino')} torch {torch.__version__}"


def int8_directory(checkpoint: Path) -> Path:
    """Where the int8 export of a checkpoint's encoder is: beside it, since several decoders may share both."""
    encoder = checkpoint / read_manifest(checkpoint).files["encoder"].path
    return encoder.with_name(f"{encoder.stem}.int8")


def quantized(checkpoint: Path) -> ExportManifest | None:
    """What is said of the int8 export beside a checkpoint's encoder, if there is one, and of this encoder."""
    manifest = read_manifest(checkpoint)
    return read_export(int8_directory(checkpoint), manifest.files["encoder"].sha256, manifest.config.preprocessing)


def export(checkpoint: Path, directory: Path) -> None:
    """Write what OpenVINO serves a checkpoint's encoder from, the same bytes each time. Raises CheckpointError.

    The float export is made, for the CPUs without int8, unless OpenVINO is missing; the int8 one beside the encoder is copied.
    """
    if exporter() != NOTHING:
        preprocessing = read_manifest(checkpoint).config.preprocessing
        save_export(as_openvino(load_encoder(checkpoint), preprocessing), checkpoint, directory / "float")
    if quantized(checkpoint) is not None:
        shutil.copytree(int8_directory(checkpoint), directory / "int8", dirs_exist_ok=True)


def as_openvino(encoder: Encoder, preprocessing: PreprocessingConfig) -> Any:
    """The encoder with its preprocessing as an openvino.Model: pixels (B, 3, size, size), uint8, to features (B, 2048)."""
    import openvino

    network = _WithPreprocessing(encoder, preprocessing).eval().requires_grad_(False)
    pixels = torch.zeros(1, 3, preprocessing.size, preprocessing.size, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: mean and std are constants, and meant to be
        model = openvino.convert_model(network, example_input=pixels)
    model.reshape([-1, *pixels.shape[1:]])
    return model


def save_export(model: Any, checkpoint: Path, directory: Path) -> None:
    """Write `directory`: the model, and of which encoder it is."""
    import openvino

    # Names are numbered through the process's life; the same model should be the same bytes.
    model.set_friendly_name("encoder")
    for number, node in enumerate(model.get_ordered_ops()):
        node.set_friendly_name(f"{node.get_type_name()}_{number}")
    directory.mkdir(parents=True, exist_ok=True)
    # Batch normalization is in the weights by now: rounded to fp16 again, they move log-likelihoods by 0.05.
    openvino.save_model(model, directory / FILES[0], compress_to_fp16=False)
    manifest = read_manifest(checkpoint)
    about = ExportManifest(
        encoder_sha256=manifest.files["encoder"].sha256,
        preprocessing=manifest.config.preprocessing,
        files={name: sha256(directory / name) for name in FILES},
    )
    (directory / EXPORT_MANIFEST).write_text(json.dumps(about.model_dump(mode="json"), indent=2) + "\n")
