"""A model on disk: one directory with its configuration, vocabulary and weights, and a digest over all of them.

    checkpoint.json       format version, configuration, the files below with their SHA-256, digest of the whole
    vocabulary.json       the tokens in the order of their numbers
    encoder.safetensors   fp16 or fp32; may lie elsewhere, so that several decoders share one encoder
    decoder.safetensors

safetensors hold numbers only: loading a foreign checkpoint never runs code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from handler.config import Config, ModelConfig
from handler.errors import CheckpointError
from handler.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

    from handler.decoder import Decoder
    from handler.encoder import Encoder

MANIFEST = "checkpoint.json"
FORMAT_VERSION = 1

Part = Literal["vocabulary", "encoder", "decoder"]
FILE_NAMES: dict[Part, str] = {
    "vocabulary": "vocabulary.json",
    "encoder": "encoder.safetensors",
    "decoder": "decoder.safetensors",
}

ConfigT = TypeVar("ConfigT", bound=Config)


class FileEntry(Config):
    path: str
    """Relative to the checkpoint's directory."""
    sha256: str


class Manifest(Config):
    """`checkpoint.json`."""

    format: Literal["caption-checkpoint"] = "caption-checkpoint"
    format_version: int = FORMAT_VERSION
    config: ModelConfig
    files: dict[Part, FileEntry]

    @property
    def digest(self) -> str:
        """SHA-256 over the configuration and the contents of all files; where the files lie does not matter."""
        parts = [self.config.model_dump_json(), *(self.files[part].sha256 for part in sorted(self.files))]
        return "sha256:" + hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A model in memory, fp32. The networks are made of torch, which is imported only where they are asked for."""

    config: ModelConfig
    vocabulary: Vocabulary
    encoder: Encoder | None
    """None if it was left on the disk."""
    weights: Mapping[str, np.ndarray]
    """The decoder's, by name (`DecoderConfig.shapes`)."""
    digest: str

    @cached_property
    def decoder(self) -> Decoder:
        """In evaluation mode. It shares the memory of `weights`."""
        from handler.networks import decoder_of

        return decoder_of(self.config.decoder, self.weights)


def load_checkpoint(directory: Path, *, with_encoder: bool = True) -> Checkpoint:
    """Read and verify a checkpoint, all of it or all but its encoder. Raises CheckpointError."""
    manifest = read_manifest(directory)
    paths = {part: verified(directory, entry) for part, entry in manifest.files.items() if part != "encoder"}
    config = manifest.config
    vocabulary = _parsed(Vocabulary, paths["vocabulary"])
    if len(vocabulary) != config.decoder.vocabulary_size:
        raise CheckpointError(
            f"{directory}: the vocabulary has {len(vocabulary)} tokens, the decoder {config.decoder.vocabulary_size}"
        )
    absent = [language.start_token for language in config.languages if language.start_token not in vocabulary.start]
    if absent:
        raise CheckpointError(f"{directory}: the vocabulary has no start token {absent}")
    weights = read_weights(paths["decoder"], config.decoder.shapes)
    encoder = None
    if with_encoder:
        from handler.networks import load_encoder

        encoder = load_encoder(directory)
    return Checkpoint(config, vocabulary, encoder, weights, manifest.digest)


def save_checkpoint(
    directory: Path,
    *,
    config: ModelConfig,
    vocabulary: Vocabulary,
    decoder: Decoder,
    encoder: Encoder | Path,
    half: bool = True,
) -> str:
    """Write a checkpoint; its manifest last, so that an interrupted one is never taken for whole. Gives the digest.

    encoder: the network, or the file of one, which is then referred to and not copied.
    half: weights as fp16.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = {part: directory / name for part, name in FILE_NAMES.items()}
    text = vocabulary.model_dump_json(indent=0)
    write_atomically(paths["vocabulary"], lambda part: part.write_text(text + "\n", encoding="utf-8"))
    write_safetensors(paths["decoder"], decoder.state_dict(), half=half)
    if isinstance(encoder, Path):
        paths["encoder"] = encoder
    else:
        write_safetensors(paths["encoder"], encoder.state_dict(), half=half)
    return _write_manifest(directory, config, paths)


def copy_checkpoint(source: Path, directory: Path) -> str:
    """Copy a checkpoint into one self-contained directory, a shared encoder included. Gives its digest."""
    manifest = read_manifest(source)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {part: directory / name for part, name in FILE_NAMES.items()}
    for part, entry in manifest.files.items():
        shutil.copyfile(verified(source, entry), paths[part])
    return _write_manifest(directory, manifest.config, paths)


def read_manifest(directory: Path) -> Manifest:
    """What a checkpoint says of itself, its weights unread. Raises CheckpointError."""
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a checkpoint: it has no {MANIFEST}")
    manifest = _parsed(Manifest, path)
    if manifest.format_version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {manifest.format_version}, this program reads {FORMAT_VERSION}")
    if set(manifest.files) != set(FILE_NAMES):
        raise CheckpointError(f"{path} must name the files {', '.join(FILE_NAMES)}")
    return manifest


def read_weights(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, as fp32; every name and shape must fit. Raises CheckpointError."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    except TypeError as error:  # numpy has no bfloat16
        raise CheckpointError(f"{path} must hold fp16 or fp32: {error}") from error
    missing, foreign = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or foreign:
        raise CheckpointError(f"{path} does not fit the model: missing {missing[:5]}, unknown {foreign[:5]}")
    floats: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise CheckpointError(f"{path}: {name} is {weights[name].shape}, the model needs {shape}")
        floats[name] = weights.pop(name).astype(np.float32)
        if not np.isfinite(floats[name]).all():
            raise CheckpointError(f"{path}: {name} holds numbers that are not finite")
    return floats


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a neighbouring file, flush it to the disk, then put it in `path`'s place at once."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.chmod(0o644)  # safetensors writes files that their owner alone can read, and the service may be another user
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], *, half: bool = False) -> None:
    """Write floating-point tensors, as fp16 if `half`; counters such as `num_batches_tracked` are left out."""
    floats = {
        name: np.ascontiguousarray(value.detach().cpu().numpy(), np.float16 if half else None)
        for name, value in tensors.items()
        if value.is_floating_point()
    }
    write_atomically(path, lambda part: save_file(floats, part))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(directory: Path, config: ModelConfig, paths: Mapping[Part, Path]) -> str:
    files = {part: FileEntry(path=os.path.relpath(path, directory), sha256=sha256(path)) for part, path in paths.items()}
    manifest = Manifest(config=config, files=files)
    content = manifest.model_dump(mode="json") | {"digest": manifest.digest}
    write_atomically(directory / MANIFEST, lambda part: part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))
    return manifest.digest


def _parsed(model: type[ConfigT], path: Path) -> ConfigT:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("digest", None) if model is Manifest else None
        parsed = model.model_validate(content)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint's {path.name}: {error}") from error
    if isinstance(parsed, Manifest) and digest != parsed.digest:
        raise CheckpointError(f"{path} has been changed: its digest does not fit its content")
    return parsed


def verified(directory: Path, entry: FileEntry) -> Path:
    """A file of a checkpoint, its content checked. Raises CheckpointError."""
    path = directory / entry.path
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint in {directory} is not complete")
    if sha256(path) != entry.sha256:
        raise CheckpointError(f"{path} is damaged or of another model: its SHA-256 is not the one in {MANIFEST}")
    return path
