"""The management client against a real TorchServe that asks for tokens."""

from __future__ import annotations

import json
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from handler.checkpoint import Checkpoint, save_checkpoint
from scripts import models
from scripts.authorization import bearer
from scripts.models import Management, ManagementError
from scripts.package_mar import package
from scripts.server import TorchServe, free_settings
from tests.conftest import ROOT

pytestmark = [pytest.mark.server, pytest.mark.slow]

CAT = (ROOT / "samples/cat.jpg").read_bytes()
CLIENTS = 4
Command = Callable[..., list[list[str]]]


@pytest.fixture(scope="module")
def store(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """caption-1.0.mar, caption-2.0.mar, and broken-3.0.mar, which has lost its weights."""
    folder = tmp_path_factory.mktemp("models")
    parts = {"vocabulary": checkpoint.vocabulary, "encoder": checkpoint.encoder, "decoder": checkpoint.decoder}
    for version in ("1.0", "2.0", "3.0"):
        config = checkpoint.config.model_copy(update={"version": version})
        save_checkpoint(folder / version, config=config, **parts)  # type: ignore[arg-type]
        model_config = ROOT / "deploy/torchserve/model-config.yaml"
        package(folder / version, folder / f"store/caption-{version}.mar", name="caption", model_config=model_config)
    whole = folder / "store/caption-3.0.mar"
    with zipfile.ZipFile(whole) as read, zipfile.ZipFile(folder / "store/broken-3.0.mar", "w") as written:
        for name in read.namelist():
            if not name.endswith("decoder.safetensors"):
                written.writestr(name, read.read(name))
    whole.unlink()
    return folder / "store"


@pytest.fixture
def running(store: Path) -> Iterator[TorchServe]:
    """A server with version 1.0."""
    settings = {"model_store": str(store), "load_models": "caption=caption-1.0.mar", "disable_token_authorization": "false"}
    settings |= {"enable_model_api": "true", "default_workers_per_model": "1"}
    with TorchServe(free_settings() | settings) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture
def command(running: TorchServe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command as it is typed; gives the fields of the lines that it prints."""

    def run(*arguments: object) -> list[list[str]]:
        options = ["--management", running.address("management"), "--key-file", running.key_file]
        monkeypatch.setattr(sys, "argv", ["models", *map(str, options), *map(str, arguments)])
        capsys.readouterr()
        models.main()
        return [line.split("\t") for line in capsys.readouterr().out.splitlines()]

    return run


def test_a_rolling_update_under_load_loses_no_request(running: TorchServe, command: Command) -> None:
    """Every request is answered, first by version 1.0, at the end by 2.0, while versions come, change places and go."""
    url = running.address("inference") + "/predictions/caption"
    token = bearer("inference", running.key_file)
    answers: list[tuple[int, str]] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                response = requests.post(url, files={"image": CAT}, headers=token, timeout=60)
                answers.append((response.status_code, response.json().get("model", {}).get("version", "")))
            except requests.RequestException as error:
                answers.append((0, repr(error)))

    def wait_for_answers(number: int) -> None:
        """Load before and after each step, however slow the machine is."""
        wanted = len(answers) + number
        while len(answers) < wanted:
            assert any(client.is_alive() for client in clients)
            stop.wait(0.05)

    clients = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        wait_for_answers(20)
        assert command("register", "caption-2.0.mar")[0][:4] == ["caption", "2.0", "-", "1 READY"]
        wait_for_answers(20)
        assert {version for _, version in answers} == {"1.0"}  # the new one waits
        blue_green = requests.post(f"{url}/2.0", files={"image": CAT}, headers=token, timeout=60)
        assert blue_green.json()["model"]["version"] == "2.0"  # and can be tried by its number
        assert command("set-default", "caption", "2.0")[0][:3] == ["caption", "2.0", "default"]
        wait_for_answers(20)
        assert command("unregister", "caption", "1.0", "--settle", "3") == [["caption 1.0 is out of service"]]
        wait_for_answers(20)
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert Counter(status for status, _ in answers) == {200: len(answers)}, Counter(answers)
    versions = [version for _, version in answers]
    assert versions[-1] == "2.0"
    assert set(versions) == {"1.0", "2.0"}
    assert [line[1:4] for line in command("list")] == [["2.0", "default", "1 READY"]]


def test_models_are_listed_described_scaled_and_what_cannot_be_is_explained(
    running: TorchServe, store: Path, command: Command
) -> None:
    """One server for all of it: its start takes longer than the commands."""

    def refused(*arguments: object) -> str:
        with pytest.raises(SystemExit) as caught:
            command(*arguments)
        return str(caught.value)

    assert command("list") == [["caption", "1.0", "default", "1 READY", "0 waiting", "caption-1.0.mar"]]
    described = json.loads("\n".join(line[0] for line in command("describe", "caption")))
    assert described["customizedMetadata"]["parameters"]["beam_size"]["maximum"] == 10
    assert command("scale", "caption", 2)[0][3] == "2 READY"
    assert command("scale", "caption", 1)[0][3] == "1 READY"

    assert "Model not found" in refused("register", "nothing.mar")
    assert "allowed URL" in refused("register", "http://169.254.169.254/model.mar")
    assert "already registered" in refused("register", "caption-1.0.mar")
    assert "9.0" in refused("set-default", "caption", "9.0")
    assert "not exist" in refused("describe", "nothing") or "not found" in refused("describe", "nothing")
    # A version that cannot load is not left behind half registered.
    began = time.monotonic()
    said = refused("register", "broken-3.0.mar")
    assert "broken-3.0.mar cannot be served, and is taken out again: a worker ended while it loaded the model" in said
    assert "log has the reason" in said
    assert time.monotonic() - began < 150  # not what workers may take to start
    assert len(command("list")) == 1

    # The default version stays as long as there is another one, and only a ready one becomes it.
    command("register", "caption-2.0.mar", "--workers", 0)
    assert "no worker that is ready" in refused("set-default", "caption", "2.0")
    assert "is the default version" in refused("unregister", "caption", "1.0")
    command("unregister", "caption", "2.0")
    assert "not exist" in refused("unregister", "caption", "2.0")
    command("unregister", "caption", "--settle", 0)
    assert command("list") == []

    management = running.address("management")
    with pytest.raises(ManagementError, match="--key-file"):
        Management(management).models()
    with pytest.raises(ManagementError, match="nothing answers"):
        Management("http://127.0.0.1:9").models()
    with pytest.raises(ManagementError, match="is no TorchServe"):
        Management(running.address("metrics"))._call("GET", "/metrics")
