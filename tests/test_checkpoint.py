"""A checkpoint comes back as it was, or is refused with a reason; never half."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from handler.checkpoint import Checkpoint, copy_checkpoint, load_checkpoint, save_checkpoint, write_atomically
from handler.errors import CheckpointError


@pytest.fixture(scope="session")
def saved(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "model"
    save(checkpoint, directory)
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    shutil.copytree(saved, tmp_path / "model", copy_function=os.link)
    return tmp_path / "model"


def save(checkpoint: Checkpoint, directory: Path) -> str:
    return save_checkpoint(
        directory,
        config=checkpoint.config,
        vocabulary=checkpoint.vocabulary,
        encoder=checkpoint.encoder,
        decoder=checkpoint.decoder,
        half=False,
    )


def test_what_is_saved_is_loaded(checkpoint: Checkpoint, saved: Path) -> None:
    loaded = load_checkpoint(saved)
    assert loaded.config == checkpoint.config
    assert loaded.vocabulary == checkpoint.vocabulary
    for one, other in ((loaded.encoder, checkpoint.encoder), (loaded.decoder, checkpoint.decoder)):
        for name, value in other.state_dict().items():
            torch.testing.assert_close(one.state_dict()[name], value, rtol=0, atol=0)
    assert not loaded.encoder.training


def test_the_digest_is_of_the_content_and_not_of_the_place(saved: Path, tmp_path: Path) -> None:
    assert (
        copy_checkpoint(saved, tmp_path / "copy") == load_checkpoint(saved).digest == load_checkpoint(tmp_path / "copy").digest
    )


def test_two_checkpoints_can_share_an_encoder(checkpoint: Checkpoint, saved: Path, tmp_path: Path) -> None:
    shutil.copyfile(saved / "encoder.safetensors", tmp_path / "encoder.safetensors")
    model = tmp_path / "en"
    save_checkpoint(
        model,
        config=checkpoint.config,
        vocabulary=checkpoint.vocabulary,
        decoder=checkpoint.decoder,
        encoder=tmp_path / "encoder.safetensors",
    )
    assert not (model / "encoder.safetensors").exists()
    assert load_checkpoint(model).config == checkpoint.config
    copy_checkpoint(model, tmp_path / "whole")
    (tmp_path / "encoder.safetensors").unlink()
    load_checkpoint(tmp_path / "whole")


@pytest.mark.parametrize("name", ["vocabulary.json", "encoder.safetensors", "decoder.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damage_is_noticed_and_the_file_is_named(copied: Path, name: str, damage: str) -> None:
    path = copied / name
    content = path.read_bytes()
    path.unlink()  # it is a link: the original stays
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(copied)


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", "null", "[" * 100_000, "\udcff", '{"format": "other"}'])
def test_a_foreign_manifest_is_refused(copied: Path, content: str) -> None:
    (copied / "checkpoint.json").unlink()
    (copied / "checkpoint.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"checkpoint\.json"):
        load_checkpoint(copied)


def test_a_newer_format_is_refused_by_number(copied: Path) -> None:
    path = copied / "checkpoint.json"
    content = json.loads(path.read_text()) | {"format_version": 99}
    path.unlink()
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="99"):
        load_checkpoint(copied)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "nan", "bfloat16"])
def test_weights_that_do_not_fit_are_named(checkpoint: Checkpoint, tmp_path: Path, change: str) -> None:
    """Even when the manifest's digests fit, as with a file that another program wrote."""
    save(checkpoint, tmp_path)
    tensors = load_file(tmp_path / "decoder.safetensors")
    if change == "missing":
        del tensors["output.bias"]
    elif change == "unknown":
        tensors["foreign"] = torch.zeros(1)
    elif change == "shape":
        tensors["output.bias"] = torch.zeros(3)
    elif change == "nan":
        tensors["output.bias"][0] = torch.nan
    else:
        tensors["output.bias"] = tensors["output.bias"].bfloat16()
    save_file(tensors, tmp_path / "decoder.safetensors")
    from handler.networks import load_weights

    said = {"unknown": "foreign", "bfloat16": "must hold fp16 or fp32"}.get(change, r"output\.bias")
    with pytest.raises(CheckpointError, match=said):
        load_weights(checkpoint.decoder, tmp_path / "decoder.safetensors")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
