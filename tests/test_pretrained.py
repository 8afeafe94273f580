"""torchvision's weights come through torch.hub's cache, checked by their hash, and offline the message says what to do."""

from __future__ import annotations

import gc
import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchvision.models._api import Weights, WeightsEnum

from scripts import pretrained
from scripts.pretrained import DownloadError, torchvision_encoder

# torch.hub leaves its connection to the garbage collector, which `hub` therefore calls before the test is over.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STATE = {
    "conv1.weight": torch.arange(6.0).view(2, 3),
    "fc.weight": torch.ones(4, 2),
    "bn1.num_batches_tracked": torch.tensor(7),
}


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """A server of the folder `site`, in which a small weight file lies under a name with its hash, as torchvision's do."""
    folder = tmp_path / "site"
    folder.mkdir()
    torch.save(STATE, folder / "weights.pth")
    digest = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()[:8]
    (folder / "weights.pth").rename(folder / f"tiny-{digest}.pth")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/tiny-{digest}.pth"
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    yield tmp_path / "torch/hub/checkpoints"
    gc.collect()


def offer(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    class Tiny(WeightsEnum):
        ONLY = Weights(url=address, transforms=torch.nn.Identity, meta={})

    monkeypatch.setitem(pretrained.TORCHVISION_WEIGHTS, "imagenet-v2", Tiny.ONLY)


def test_the_classifier_is_left_out_and_the_second_call_needs_no_connection(
    tmp_path: Path, site: str, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, site)
    written = load_file(torchvision_encoder("imagenet-v2", tmp_path / "encoder.safetensors"))
    assert set(written) == {"conv1.weight"}
    assert torch.equal(written["conv1.weight"].float(), STATE["conv1.weight"])

    next((tmp_path / "site").iterdir()).unlink()
    again = load_file(torchvision_encoder("imagenet-v2", tmp_path / "again.safetensors"))  # from torch.hub's cache
    assert set(again) == {"conv1.weight"}


def test_a_changed_file_is_refused(tmp_path: Path, site: str, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, site)
    torch.save({"conv1.weight": torch.zeros(2, 3)}, next((tmp_path / "site").iterdir()))
    with pytest.raises(DownloadError, match="hash"):
        torchvision_encoder("imagenet-v2", tmp_path / "encoder.safetensors")
    assert not (tmp_path / "encoder.safetensors").exists()
    assert not list(hub.iterdir())


def test_offline_the_message_names_the_file_and_the_folder(
    tmp_path: Path, site: str, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = site.replace("tiny", "none")
    offer(monkeypatch, missing)
    with pytest.raises(DownloadError) as caught:
        torchvision_encoder("imagenet-v2", tmp_path / "encoder.safetensors")
    assert missing in str(caught.value)
    assert str(hub) in str(caught.value)
