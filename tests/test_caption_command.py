"""Captions on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from handler.checkpoint import Checkpoint, save_checkpoint
from scripts import caption
from tests.conftest import SAMPLES


@pytest.fixture(scope="module")
def saved(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("command") / "checkpoint"
    parts = {"vocabulary": checkpoint.vocabulary, "encoder": checkpoint.encoder, "decoder": checkpoint.decoder}
    save_checkpoint(directory, config=checkpoint.config, **parts)  # type: ignore[arg-type]
    return directory


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["caption", *map(str, arguments)])
    caption.main()


def test_files_and_folders(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, SAMPLES[0].parent, SAMPLES[0], "--checkpoint", saved)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(path) for path in (*SAMPLES, SAMPLES[0])]


def test_json_lines_are_answers_of_the_service(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, SAMPLES[0], "--checkpoint", saved, "--json", "--beam-size", 3, "--num-captions", 3)
    (line,) = capsys.readouterr().out.splitlines()
    content = json.loads(line)
    assert set(content) == {"file", "captions", "image", "model", "timing_ms"}
    assert 1 <= len(content["captions"]) <= 3


def test_a_bad_file_is_reported_and_the_rest_goes_on(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="2 of 3 images"):
        run(monkeypatch, tmp_path / "broken.jpg", tmp_path / "missing.jpg", SAMPLES[0], "--checkpoint", saved)
    printed = capsys.readouterr()
    assert "broken.jpg: InvalidImage" in printed.err
    assert "missing.jpg: InvalidImage: the file cannot be read" in printed.err
    assert printed.out.startswith(str(SAMPLES[0]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--beam-size", "11"], "from 1 to 10"),
        (["--language", "xx"], "one of en"),
        (["--checkpoint", "nowhere"], "is not a checkpoint"),
    ],
)
def test_bad_arguments_are_explained(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, SAMPLES[0], "--checkpoint", saved, *arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
