"""Models of several languages side by side in one TorchServe, over HTTP: converted from chainer-caption, and answering as
Chainer itself did."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from scripts.package_mar import package
from scripts.server import TorchServe, free_settings
from tests.chainer import golden
from tests.chainer.models import write_models
from tests.chainer.photos import photos
from tests.conftest import ROOT, running_edge

pytestmark = [pytest.mark.server, pytest.mark.slow]

MODELS = {"caption": "words", "caption_ja": "characters", "caption_multi": "languages"}
"""Names in TorchServe and the golden case that each model is of."""
BEAM = 5
PHOTO = photos()["portrait"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, converted: Callable[[str], Path]) -> Iterator[TorchServe]:
    """A TorchServe that starts with one model, the others registered through the management API."""
    folder = tmp_path_factory.mktemp("languages")
    store = folder / "model_store"
    store.mkdir()
    words = golden.read(golden.GOLDEN / "words")
    files = write_models(folder, words.vocabulary, hidden=words.case["hidden"], seed=words.case["seed"])
    for command in (  # the way of the documentation
        f"convert_chainer --cnn-model {files.cnn} --rnn-model {files.rnn} --vocab {files.vocabulary} -o {folder}/words",
        f"package_mar --checkpoint {folder}/words --name caption --output {store}/caption.mar",
    ):
        subprocess.run([sys.executable, "-m", *f"scripts.{command}".split()], cwd=ROOT, check=True)
    model_config = ROOT / "deploy/torchserve/model-config.yaml"
    for name in ("caption_ja", "caption_multi"):
        package(converted(MODELS[name]), store / f"{name}.mar", name=name, model_config=model_config)
    settings = {"model_store": str(store), "enable_model_api": "true", "default_workers_per_model": "1"}
    with TorchServe(free_settings() | settings) as running:
        running.wait_until_ready()
        for name in ("caption_ja", "caption_multi"):
            register(running, name)
        yield running


def register(service: TorchServe, name: str) -> None:
    query = {"url": f"{name}.mar", "initial_workers": "1", "synchronous": "true"}
    response = requests.post(service.address("management") + "/models", params=query, timeout=180)
    assert response.status_code == 200, response.text


def workers(service: TorchServe, name: str) -> list[str]:
    (model,) = requests.get(f"{service.address('management')}/models/{name}", timeout=10).json()
    return [worker["status"] for worker in model["workers"]]


def post(service: TorchServe, model: str, image: bytes = PHOTO, **parameters: Any) -> requests.Response:
    url = f"{service.address('inference')}/predictions/{model}"
    return requests.post(url, files={"image": image}, data=parameters, timeout=120)


def assert_answered_as_by_chainer(response: requests.Response, name: str, photo: str, start: str, **search: int) -> None:
    answers = golden.read(golden.GOLDEN / MODELS[name])
    tokens = {index: word for word, index in answers.vocabulary.items()}
    expected = answers.best(photo, start, **search)[: search["beam"]]
    captions = response.json()["captions"]
    assert [c["sentence"] for c in captions] == [[tokens[index] for index in e["path"]] for e in expected]
    assert [c["log_likelihood"] for c in captions] == pytest.approx([e["log_likelihood"] for e in expected], abs=1e-4, rel=1e-6)


@pytest.mark.parametrize("photo", golden.read(golden.GOLDEN / "words").case["photos"])
def test_a_converted_model_answers_what_chainers_own_search_found(service: TorchServe, photo: str) -> None:
    """Without parameters as its server did: beam 5, depth 50."""
    assert_answered_as_by_chainer(post(service, "caption", photos()[photo]), "caption", photo, "<sos>", beam=BEAM)
    short = post(service, "caption", photos()[photo], beam_size=3, max_length=9)
    assert_answered_as_by_chainer(short, "caption", photo, "<sos>", beam=3, depth=10)


def test_the_old_url_answers_a_converted_model_as_chainers_server_did(service: TorchServe) -> None:
    """Converter, archive, TorchServe, edge: `curl -F image=@x.png localhost:8090/predict`."""
    photo = "landscape"
    with running_edge({"EDGE_UPSTREAM": service.address("inference").removeprefix("http://")}) as edge:
        response = requests.post(f"{edge.url}/predict", files={"image": photos()[photo]}, timeout=120)
    assert response.status_code == 200
    assert_answered_as_by_chainer(response, "caption", photo, "<sos>", beam=BEAM)


def test_models_side_by_side_answer_each_in_its_language(service: TorchServe) -> None:
    listed = requests.get(service.address("management") + "/models", timeout=10).json()["models"]
    assert sorted(model["modelName"] for model in listed) == sorted(MODELS)
    for name, start, code in (("caption", "<sos>", "en"), ("caption_ja", "<sos>", "ja"), ("caption_multi", "<en>", "en")):
        response = post(service, name)
        assert_answered_as_by_chainer(response, name, "portrait", start, beam=BEAM)
        model = response.json()["model"]
        assert (model["name"], model["language"]) == (name, code)
    assert len({post(service, name).json()["model"]["digest"] for name in MODELS}) == len(MODELS)


def words_of(caption: dict[str, Any]) -> list[str]:
    return [word for word in caption["sentence"][1:] if word != "<eos>"]


def test_captions_are_joined_as_the_language_is_written(service: TorchServe) -> None:
    cases = [("caption", {}, " "), ("caption_ja", {}, ""), ("caption_multi", {"language": "ja"}, "")]
    for name, parameters, separator in [*cases, ("caption_multi", {"language": "en"}, " ")]:
        for caption in post(service, name, **parameters).json()["captions"]:
            assert caption["caption"] == separator.join(words_of(caption))


def test_no_letter_is_escaped(service: TorchServe) -> None:
    response = post(service, "caption_ja")
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert response.json()["captions"][0]["caption"].encode() in response.content
    assert b"\\u" not in response.content


def test_the_first_token_chooses_the_language_of_a_multilingual_model(service: TorchServe) -> None:
    for language, start in (("en", "<en>"), ("ja", "<jp>")):
        response = post(service, "caption_multi", language=language)
        assert_answered_as_by_chainer(response, "caption_multi", "portrait", start, beam=BEAM)
        assert response.json()["model"]["language"] == language
    first = [post(service, "caption_multi", language=code).json()["captions"][0]["caption"] for code in ("en", "ja")]
    assert first[0] != first[1]


@pytest.mark.parametrize(
    ("model", "language", "said"),
    [
        ("caption_multi", "fr", "language must be one of en, ja"),
        ("caption_multi", "<jp>", "language must be one of en, ja"),
        ("caption", "ja", "language must be one of en,"),
        ("caption_ja", "EN", "language must be one of ja,"),
    ],
)
def test_a_language_that_the_model_lacks_is_refused(service: TorchServe, model: str, language: str, said: str) -> None:
    response = post(service, model, language=language)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "InvalidParameter")
    assert said in error["message"]


def test_the_management_api_says_what_languages_a_model_writes(service: TorchServe) -> None:
    url = f"{service.address('management')}/models/caption_multi?customized=true"
    (model,) = requests.get(url, timeout=10).json()
    described = model["customizedMetadata"]
    assert described["languages"] == ["en", "ja"]
    assert described["parameters"]["language"].items() >= {"default": "en", "enum": ["en", "ja"]}.items()
    assert described["architecture"]["encoder"] == "resnet50-caffe"


def test_each_model_is_scaled_and_removed_without_the_others(service: TorchServe) -> None:
    url = f"{service.address('management')}/models/caption_ja"
    assert requests.put(url, params={"min_worker": "2", "max_worker": "2"}, timeout=60).status_code == 202
    deadline = time.monotonic() + 180
    while workers(service, "caption_ja") != ["READY"] * 2:
        assert time.monotonic() < deadline, workers(service, "caption_ja")
        time.sleep(0.5)
    assert (workers(service, "caption"), workers(service, "caption_multi")) == (["READY"], ["READY"])
    assert requests.delete(url, timeout=60).status_code == 200
    assert post(service, "caption_ja").status_code == 404
    assert post(service, "caption").status_code == 200
    register(service, "caption_ja")
    assert post(service, "caption_ja").status_code == 200
