"""What runs the encoder: torch or OpenVINO, in several precisions, behind one small interface.

`load_engine` takes the wanted one, or the fastest that the archive and the machine allow, and says which and why.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from handler.checkpoint import sha256
from handler.config import Config, EngineName, PreprocessingConfig
from handler.encoder import Encoder, fused
from handler.errors import CheckpointError
from handler.image import mean_and_std, normalize

logger = logging.getLogger(__name__)

Numbers = Literal["float", "int8"]
"""Of an exported encoder's weights, and the name of the directory that it is in."""

EXPORT_MANIFEST = "engine.json"
TORCH_DTYPES = {"torch-fp32": torch.float32, "torch-bf16": torch.bfloat16, "torch-fp16": torch.float16}
OPENVINO_EXPORTS: dict[str, Numbers] = {"openvino-fp32": "float", "openvino-bf16": "float", "openvino-int8": "int8"}
OPENVINO_PRECISIONS = {"openvino-fp32": "f32", "openvino-bf16": "bf16", "openvino-int8": "bf16"}
"""OpenVINO's own precision; of the int8 file, that of the few layers that are not quantized."""
INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}
"""Instructions that multiply and add int8 without an intermediate that overflows."""


class Engine(Protocol):
    name: str
    device: torch.device
    """Where the features are."""

    def encode(self, images: Tensor) -> Tensor:
        """Pixels (B, 3, size, size), uint8, on the CPU, to features (B, 2048), float32."""
        ...


class ExportManifest(Config):
    """`engine.json`: what an exported encoder was made of, and its files `encoder.xml` and `encoder.bin`."""

    encoder_sha256: str
    """Of the checkpoint's encoder, without which there would be no telling that the files are of another model."""
    preprocessing: PreprocessingConfig
    """It is part of the graph."""
    files: dict[str, str]
    """SHA-256 of each."""


class TorchEngine:
    """The checkpoint's own weights, on any device."""

    def __init__(
        self,
        encoder: Encoder,
        preprocessing: PreprocessingConfig,
        *,
        name: str,
        device: torch.device,
        recorded: bool = False,
    ) -> None:
        """recorded: as a CUDA graph and without batch norms, which takes a moment and some of the GPU's memory."""
        self.name = name
        self.device = device
        self._preprocessing = preprocessing
        self._constants = mean_and_std(preprocessing, device)  # a graph can take nothing from the CPU
        self._dtype = TORCH_DTYPES[name]
        if device.type == "cuda":
            # Where fp32 was asked for, convolutions should not round their inputs to 10 bits.
            torch.backends.cudnn.allow_tf32 = self._dtype != torch.float32
        encoder = fused(encoder) if recorded else encoder
        # The layout that bf16 and fp16 convolutions are fast in.
        self._encoder = encoder.to(device, self._dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._encode: Callable[[Tensor], Tensor] = self._launch
        if recorded:
            from handler.cuda_graphs import RecordedEncoder

            self._encode = RecordedEncoder(self._launch, preprocessing.size, device).encode

    def encode(self, images: Tensor) -> Tensor:
        return self._encode(images)

    @torch.inference_mode()
    def _launch(self, images: Tensor) -> Tensor:
        batch = normalize(images.to(self.device), self._preprocessing, self._constants).to(self._dtype)
        return self._encoder(batch.contiguous(memory_format=torch.channels_last)).float()


def load_engine(
    wanted: EngineName,
    *,
    exported: Path,
    encoder_sha256: str,
    load_encoder: Callable[[], Encoder],
    preprocessing: PreprocessingConfig,
    device: torch.device,
    threads: int,
    threads_alone: int = 0,
) -> Engine:
    """The wanted engine, or else the first that works of those that `auto` tries; the log says what was in the way.

    exported: the directory that `scripts.export` has written, if any.
    load_encoder: called only where torch serves, since a cold start should not read what it does not need.
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
            recorded = device.type == "cuda"
            return TorchEngine(load_encoder(), preprocessing, name=name, device=device, recorded=recorded)
        from handler.openvino_engine import OpenVinoEncoder

        return OpenVinoEncoder(
            exported / numbers / "encoder.xml",
            name=name,
            precision=openvino_precision(name),
            threads=threads,
            threads_alone=threads_alone,
        )
    raise AssertionError("torch-fp32 works everywhere")


def automatic(device: torch.device) -> list[EngineName]:
    """The engines worth trying on this kind of device, the fastest first, by docs/performance.md."""
    if device.type == "cuda":
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


def _obstacle(name: EngineName, device: torch.device) -> str | None:
    """Why this machine cannot serve by this engine, or should not."""
    if name in TORCH_DTYPES:
        if name == "torch-bf16" and device.type == "cpu" and not _torch_has_bfloat16():
            return "the CPU has no instructions for bfloat16"
        if name == "torch-fp16" and device.type == "cpu":
            return "it needs a GPU"
        return None
    if device.type != "cpu":
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
