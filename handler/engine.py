"""What runs the encoder: torch or OpenVINO, in several precisions, behind one small interface.

`load_engine` takes the wanted one, or the fastest that the archive and the machine allow, and says which and why.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from handler.checkpoint import sha256
from handler.config import Config, EngineName, PreprocessingConfig
from handler.errors import CheckpointError

logger = logging.getLogger(__name__)

Numbers = Literal["float", "int8"]
"""Of an exported encoder's weights, and the name of the directory that it is in."""

EXPORT_MANIFEST = "engine.json"
OPENVINO_EXPORTS: dict[str, Numbers] = {"openvino-fp32": "float", "openvino-bf16": "float", "openvino-int8": "int8"}
OPENVINO_PRECISIONS = {"openvino-fp32": "f32", "openvino-bf16": "bf16", "openvino-int8": "bf16"}
"""OpenVINO's own precision; of the int8 file, that of the few layers that are not quantized."""
INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}
"""Instructions that multiply and add int8 without an intermediate that overflows."""


class Engine(Protocol):
    name: str
    device: str
    """What computes, such as `cpu` or `cuda:0`."""

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Pixels (B, 3, size, size), uint8, to features (B, 2048), float32."""
        ...


class ExportManifest(Config):
    """`engine.json`: what an exported encoder was made of, and its files `encoder.xml` and `encoder.bin`."""

    encoder_sha256: str
    """Of the checkpoint's encoder, without which there would be no telling that the files are of another model."""
    preprocessing: PreprocessingConfig
    """It is part of the graph."""
    files: dict[str, str]
    """SHA-256 of each."""


def load_engine(
    wanted: EngineName,
    *,
    exported: Path,
    encoder_sha256: str,
    checkpoint: Path,
    preprocessing: PreprocessingConfig,
    device: str,
    threads: int,
    threads_alone: int = 0,
) -> Engine:
    """The wanted engine, or else the first that works of those that `auto` tries; the log says what was in the way.

    exported: the directory that `scripts.export` has written, if any.
    checkpoint: its encoder is read only where torch serves, and torch imported: a cold start takes what it needs.
    threads_alone: for an image that comes alone, where that is more than `threads`; of OpenVINO only.

    Raises CheckpointError when files in `exported` are damaged.
    """
    candidates = [wanted, *automatic(device)] if wanted != "auto" else automatic(device)
    obstacles: list[str] = []
    for name in candidates:
        numbers = OPENVINO_EXPORTS.get(name)
        obstacle = _obstacle(name, device)
        if obstacle is None and numbers and read_export(exported / numbers, encoder_sha256, preprocessing) is None:
            obstacle = f"the archive was packed without an encoder in {numbers} for OpenVINO (docs/performance.md)"
        if obstacle is not None:
            obstacles.append(f"; not {name}: {obstacle}")
            continue
        level = logging.WARNING if obstacles and wanted != "auto" else logging.INFO
        logger.log(level, "engine %s on %s with %d threads%s", name, device, threads, "".join(obstacles))
        if numbers is None:
            from handler.torch_engine import load_torch_engine

            return load_torch_engine(checkpoint, preprocessing, name=name, device=device, threads=threads)
        from handler.openvino_engine import OpenVinoEncoder

        return OpenVinoEncoder(
            exported / numbers / "encoder.xml",
            name=name,
            precision=openvino_precision(name),
            threads=threads,
            threads_alone=threads_alone,
        )
    raise AssertionError("torch-fp32 works everywhere")


def is_gpu(device: str) -> bool:
    return device.startswith("cuda")


def automatic(device: str) -> list[EngineName]:
    """The engines worth trying on this kind of device, the fastest first, by docs/performance.md."""
    if is_gpu(device):
        return ["torch-fp16", "torch-fp32"]
    return ["openvino-int8", "openvino-bf16", "openvino-fp32", "torch-bf16", "torch-fp32"]


def read_export(directory: Path, encoder_sha256: str, preprocessing: PreprocessingConfig) -> ExportManifest | None:
    """What was exported, if it was, and of this model. Raises CheckpointError when the files are damaged."""
    path = directory / EXPORT_MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = ExportManifest.model_validate(json.loads(path.read_bytes()))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if manifest.encoder_sha256 != encoder_sha256 or manifest.preprocessing != preprocessing:
        logger.warning("%s is of another encoder or preprocessing, so it is not used", directory)
        return None
    for name, digest in manifest.files.items():
        if not (directory / name).is_file() or sha256(directory / name) != digest:
            raise CheckpointError(f"{directory / name} is missing or damaged")
    return manifest


def openvino_precision(name: str) -> str:
    from handler.openvino_engine import has_bfloat16

    return OPENVINO_PRECISIONS[name] if has_bfloat16() else "f32"


def _obstacle(name: EngineName, device: str) -> str | None:
    """Why this machine cannot serve by this engine, or should not."""
    if name not in OPENVINO_EXPORTS:
        if name == "torch-bf16" and not is_gpu(device) and not _torch_has_bfloat16():
            return "the CPU has no instructions for bfloat16"
        if name == "torch-fp16" and not is_gpu(device):
            return "it needs a GPU"
        return None
    if is_gpu(device):
        return "OpenVINO is used on CPUs alone"
    if importlib.util.find_spec("openvino") is None:
        return "the package openvino is not installed"
    if name == "openvino-int8" and not INT8_FLAGS & cpu_flags():
        return "the CPU has none of the instructions " + ", ".join(sorted(INT8_FLAGS))
    if name == "openvino-bf16" and openvino_precision(name) != "bf16":
        return "the CPU has no instructions for bfloat16"
    return None


def cpu_flags() -> set[str]:
    """The CPU's features as Linux names them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split()}


def _torch_has_bfloat16() -> bool:
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & cpu_flags())
