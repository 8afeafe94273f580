"""chainer-caption's models, converted: they see, search and score as in Chainer itself, and no foreign file gets through.

Chainer's answers are golden files, computed by Chainer's own links (tests/chainer). Where Chainer can be installed, the
slow tests let it answer again, about models that it saved itself.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from handler.captioner import Captioner
from handler.checkpoint import Checkpoint, load_checkpoint, read_manifest
from handler.parameters import Parameters
from scripts import convert_chainer
from scripts.convert_chainer import (
    ChainerFileError,
    caption_features,
    convert,
    languages_of,
    read_decoder,
    read_encoder,
    read_vocabulary,
)
from tests.chainer import golden
from tests.chainer.environment import EnvironmentUnavailable
from tests.chainer.golden import REAL_VOCABULARIES, Answers
from tests.chainer.models import (
    CNN_FILE,
    DECODER_FILE,
    ModelFiles,
    Weights,
    random_cnn,
    random_decoder,
    vocabulary_of,
    write_hdf5,
)
from tests.chainer.photos import photos
from tests.conftest import ROOT

SPECIAL = {"<sos>": 4, "<eos>": 2, "<ukn>": 49}
WORDS = vocabulary_of(SPECIAL, 50, "word{}".format)
HIDDEN = 8


# -- parity with Chainer


def assert_agrees(checkpoint: Path, answers: Answers) -> None:
    """From the bytes of each photo to every caption of each search."""
    model = load_checkpoint(checkpoint)
    captioner = Captioner(model)
    made = photos()
    files = {name: made[name] if name in made else Path(name).read_bytes() for name in answers.case["photos"]}
    features = captioner.encode([captioner.prepare(file).pixels for file in files.values()])
    np.testing.assert_allclose(features, answers.features, rtol=1e-4, atol=1e-4 * answers.features.mean())

    state = model.decoder.start(torch.from_numpy(answers.features[:1]))
    for word, probabilities in zip(answers.case["words"], answers.probabilities, strict=True):
        with torch.inference_mode():
            logits, state = model.decoder.step(torch.tensor([word]), state)
        np.testing.assert_allclose(logits.softmax(1)[0], probabilities, rtol=1e-4)

    # The search by itself, from Chainer's features, and from the photos on. CPUs differ in the last digits of the features
    # above, which a long caption adds up.
    for found_from, relative in ((answers.features, 1e-6), (features, 1e-5)):
        assert_same_search(captioner, model, found_from, list(files), answers, relative)


def assert_same_search(
    captioner: Captioner, model: Checkpoint, features: np.ndarray, names: list[str], answers: Answers, relative: float
) -> None:
    rows = {name: row for row, name in enumerate(names)}
    for start, beam, depth in sorted({(answer["start"], answer["beam"], answer["depth"]) for answer in answers.captions}):
        inputs = torch.from_numpy(features)
        found = caption_features(model.decoder, model.vocabulary, inputs, start_token=start, beam=beam, depth=depth)
        for name, row in rows.items():
            best = answers.best(name, start, beam=beam, depth=depth)
            assert_same_captions(found[row], best, model.vocabulary.tokens, relative)

    # as the service searches: whatever is asked for, in one batch
    code = {language.start_token: language.code for language in model.config.languages}
    parameters = [
        Parameters(beam_size=answer["beam"], max_length=answer["depth"] - 1, language=code[answer["start"]])
        for answer in answers.captions
    ]
    batch = captioner.search(features[[rows[answer["photo"]] for answer in answers.captions]], parameters)
    for captions, answer in zip(batch, answers.captions, strict=True):
        served = [{"sentence": [*c.sentence], "log_likelihood": c.log_likelihood} for c in captions]
        assert_same_captions(served, answer["found"][: answer["beam"]], model.vocabulary.tokens, relative)


def assert_same_captions(
    ours: list[dict[str, Any]], chainers: list[dict[str, Any]], tokens: tuple[str, ...], relative: float = 1e-6
) -> None:
    assert [c["sentence"] for c in ours] == [[tokens[index] for index in c["path"]] for c in chainers]
    expected = [c["log_likelihood"] for c in chainers]
    assert [c["log_likelihood"] for c in ours] == pytest.approx(expected, abs=1e-4, rel=relative)


@pytest.mark.parametrize("name", golden.NAMES)
def test_features_probabilities_and_captions_are_chainers(name: str, converted: Callable[[str], Path]) -> None:
    assert_agrees(converted(name), golden.read(golden.GOLDEN / name))


def test_the_golden_cases_have_captions_of_every_kind() -> None:
    """Short, long, cut by the depth, more than the beam; else the comparison above would say little."""
    answers = [answer for name in golden.NAMES for answer in golden.read(golden.GOLDEN / name).captions]
    lengths = {len(found["path"]) for answer in answers if answer["depth"] == 50 for found in answer["found"]}
    assert len(lengths & set(range(3, 20))) > 10
    assert 50 in lengths
    assert any(len(answer["found"]) > answer["beam"] for answer in answers)
    assert any(len(answer["found"]) < answer["beam"] + 1 for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.NAMES)
def test_chainer_answers_the_same_about_models_that_it_saved_itself(name: str, tmp_path: Path) -> None:
    try:
        answers = golden.compute(name, tmp_path, photos=[ROOT / "samples/cat.jpg"])
    except EnvironmentUnavailable as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"Chainer cannot be installed here: {error}")
    vocabulary = tmp_path / "dictionary.json"
    vocabulary.write_text(json.dumps(answers.vocabulary))
    convert(tmp_path / CNN_FILE, tmp_path / DECODER_FILE, vocabulary, tmp_path / "checkpoint")
    assert_agrees(tmp_path / "checkpoint", answers)

    kept = golden.read(golden.GOLDEN / name)
    np.testing.assert_allclose(answers.features[:-1], kept.features, rtol=1e-4, atol=1e-4 * kept.features.mean())
    assert [[c["path"] for c in a["found"]] for a in kept.captions] == [
        [c["path"] for c in a["found"]] for a in answers.captions[: len(kept.captions)]
    ]


def test_the_search_of_a_converted_model_is_chainer_captions(converted: Callable[[str], Path]) -> None:
    """No length penalty, a depth of 50 that counts the start token, and no word is forbidden."""
    model = load_checkpoint(converted("words"))
    assert (model.config.search.length_penalty, model.config.search.max_length) == (0, 49)
    assert not model.config.search.suppress_unknown
    assert model.vocabulary.never_generated == []


def test_hidden_size_is_that_of_the_file(converted: Callable[[str], Path]) -> None:
    assert read_manifest(converted("words")).config.decoder.hidden_size == 512
    assert read_manifest(converted("languages")).config.decoder.hidden_size == 1024


# -- cached features


def test_cached_features_get_chainers_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As generate_caption.py wrote them: file name to captions."""
    answers = golden.read(golden.GOLDEN / "characters")
    case = answers.case
    decoder, vocabulary, cache = tmp_path / "decoder.model", tmp_path / "dic.json", tmp_path / "features"
    write_hdf5(
        decoder, random_decoder(case["vocabulary_size"], case["hidden"], end=case["special"]["<eos>"], seed=case["seed"])
    )
    vocabulary.write_text(json.dumps(answers.vocabulary))
    cache.mkdir()
    for photo, row in zip(case["photos"], answers.features, strict=True):
        np.savez(cache / photo, row)
    options = ["--features", cache, "--rnn-model", decoder, "--vocab", vocabulary, "-o", tmp_path / "captions.json"]
    run(monkeypatch, *options)  # beam 3 and depth 50 are the defaults, as they were
    found = json.loads((tmp_path / "captions.json").read_text())
    tokens = tuple(read_vocabulary(vocabulary).tokens)
    for photo in case["photos"]:
        assert_same_captions(found[f"{photo}.npz"], answers.best(photo, "<sos>", beam=3), tokens)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: np.savez(path, np.zeros(2047, np.float32)), "2048 numbers"),
        (lambda path: np.savez(path, np.full(2048, np.nan)), "not finite"),
        (lambda path: np.savez(path, np.array([{"a": 1}], object)), "allow_pickle"),
        (lambda path: np.savez(path, features=np.zeros(2048)), "arr_0"),
        (lambda path: path.write_bytes(b"PK\3\4 cut off"), "not a feature file"),
        (lambda path: path.with_suffix(".npy").write_bytes(b""), "holds no .npz files"),
    ],
    ids=["too short", "not a number", "pickled objects", "another name", "cut off", "none"],
)
def test_wrong_features_are_named(
    tmp_path: Path, files: ModelFiles, monkeypatch: pytest.MonkeyPatch, capsys: Any, write: Callable[[Path], None], said: str
) -> None:
    (tmp_path / "features").mkdir()
    write(tmp_path / "features/photo.npz")
    options = ["--features", tmp_path / "features", "--rnn-model", files.rnn, "--vocab", files.vocabulary]
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *options, "-o", tmp_path / "captions.json")
    assert said in capsys.readouterr().err
    assert not (tmp_path / "captions.json").exists()


# -- wrong files


@pytest.fixture(scope="session")
def good_files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = tmp_path_factory.mktemp("chainer")
    files = ModelFiles(folder / "cnn.model", folder / "rnn.model", folder / "dictionary.json")
    write_hdf5(files.cnn, random_cnn(0))
    write_hdf5(files.rnn, small_decoder())
    files.vocabulary.write_text(json.dumps(WORDS))
    return files


@pytest.fixture
def files(good_files: ModelFiles, tmp_path: Path) -> ModelFiles:
    """Files that fit together. The decoder and the vocabulary are the test's own, to be spoilt."""
    own = ModelFiles(good_files.cnn, tmp_path / "rnn.model", tmp_path / "dictionary.json")
    shutil.copyfile(good_files.rnn, own.rnn)
    shutil.copyfile(good_files.vocabulary, own.vocabulary)
    return own


def small_decoder() -> Weights:
    return random_decoder(len(WORDS), HIDDEN, end=SPECIAL["<eos>"], seed=0)


def run(monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    monkeypatch.setattr("sys.argv", ["convert_chainer", *map(str, options)])
    convert_chainer.main()


def test_good_files_make_a_checkpoint_that_is_not_overwritten(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ["--cnn-model", files.cnn, "--rnn-model", files.rnn, "--vocab", files.vocabulary, "-o", tmp_path / "checkpoint"]
    run(monkeypatch, *options, "--version", "2.1")
    assert "50 tokens, hidden size 8, en (<sos>, words), sha256:" in capsys.readouterr().out
    first = read_manifest(tmp_path / "checkpoint")
    assert first.config.version == "2.1"
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *options)
    assert "--force" in capsys.readouterr().err
    assert read_manifest(tmp_path / "checkpoint") == first
    run(monkeypatch, *options, "--force", "--half", "--language", "fr")
    assert read_manifest(tmp_path / "checkpoint").config.languages[0].code == "fr"


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewritten(**changes: Any) -> Callable[[Path], None]:
    """The decoder with other values for some datasets; None leaves one out. `__` in a name stands for `/`."""

    def write(path: Path) -> None:
        weights = small_decoder() | {name.replace("__", "/"): values for name, values in changes.items()}
        write_hdf5(path, {name: values for name, values in weights.items() if values is not None})

    return write


def relinked(make: Callable[[h5py.File, Path], None]) -> Callable[[Path], None]:
    """The decoder, whose `decode_word/b` is not in the file itself."""

    def write(path: Path) -> None:
        other = path.with_name("other.h5")
        write_hdf5(other, small_decoder())
        with h5py.File(path, "a") as file:
            del file["decode_word/b"]
            make(file, other)

    return write


def virtual(file: h5py.File, other: Path) -> None:
    layout = h5py.VirtualLayout((len(WORDS),), np.float32)
    layout[:] = h5py.VirtualSource(other, "decode_word/b", (len(WORDS),))
    file.create_virtual_dataset("decode_word/b", layout)


def claiming(name: str, shape: tuple[int, ...]) -> Callable[[Path], None]:
    """The decoder with a dataset that claims to be far larger than the file, as HDF5 allows it."""

    def write(path: Path) -> None:
        with h5py.File(path, "a") as file:
            del file[name]
            file.create_dataset(name, shape, np.float32, chunks=(1,) * len(shape))

    return write


NAN = np.full((HIDDEN, HIDDEN), np.nan, np.float32)
OTHER_WORDS = vocabulary_of(SPECIAL | {"<ukn>": 39}, 40, "mot{}".format)
WRONG: list[tuple[str, str, Callable[[Path], Any], str]] = [
    ("cut off", "rnn", cut_off, "damaged or cut off, copy it again"),
    ("empty", "rnn", lambda path: path.write_bytes(b""), "is empty, not an HDF5 file"),
    ("missing", "rnn", Path.unlink, "does not exist"),
    ("a pickle", "rnn", lambda path: path.write_bytes(pickle.dumps({"W": 1})), "a Python pickle, which is not opened"),
    ("an .npz", "rnn", lambda path: path.write_bytes(b"PK\3\4"), "zip archive"),
    ("JSON", "rnn", lambda path: path.write_text("{}"), "is JSON"),
    ("text", "rnn", lambda path: path.write_text("hello"), "of another format"),
    ("a dataset lacks", "rnn", rewritten(lstm__0__w3=None), "it lacks lstm/0/w3"),
    ("a dataset too many", "rnn", rewritten(attention__W=np.zeros(3)), "unknown in it are attention/W"),
    ("a matrix transposed", "rnn", rewritten(embed_image__W=np.zeros((2048, HIDDEN), np.float32)), "must be (8, 2048)"),
    ("a gate too large", "rnn", rewritten(lstm__0__w5=np.zeros((9, 9), np.float32)), "lstm/0/w5 is (9, 9), it must be (8, 8)"),
    ("no matrix", "rnn", rewritten(decode_word__W=np.zeros(50, np.float32)), "must be matrices"),
    ("not numbers", "rnn", rewritten(decode_word__b=np.array([b"x"] * 50)), "must hold floating-point numbers"),
    ("not a number", "rnn", rewritten(lstm__0__w7=NAN), "not finite"),
    ("never trained", "rnn", rewritten(decode_word__b=h5py.Empty("f")), "must hold floating-point numbers"),
    ("external link", "rnn", relinked(lambda f, o: f.update({"decode_word/b": h5py.ExternalLink(o, "/b")})), "a link"),
    ("soft link", "rnn", relinked(lambda f, o: f.update({"decode_word/b": h5py.SoftLink("/embed_image/b")})), "a link"),
    (
        "external storage",
        "rnn",
        relinked(lambda f, o: f.create_dataset("decode_word/b", (50,), np.float32, external=[(str(o), 0, 200)])),
        "kept in another file",
    ),
    ("virtual", "rnn", relinked(virtual), "kept in another file"),
    ("a petabyte of words", "rnn", claiming("embed_word/W", (50, 10**13)), "not from 1 to 4096"),
    ("a petabyte of gates", "rnn", claiming("lstm/0/w0", (10**9, 10**6)), "it must be (8, 8)"),
    ("another vocabulary", "vocabulary", lambda path: path.write_text(json.dumps(OTHER_WORDS)), "has 40 words, the decoder"),
    ("no JSON", "vocabulary", lambda path: path.write_bytes(b"\xff{"), "is not a vocabulary, which is a JSON file"),
    ("no words", "vocabulary", lambda path: path.write_text("[]"), "is not a vocabulary"),
    ("a gap", "vocabulary", lambda path: path.write_text(json.dumps(WORDS | {"<sos>": 50})), "each index from 0 on once"),
    (
        "no end",
        "vocabulary",
        lambda path: path.write_text(json.dumps(vocabulary_of({"<sos>": 0, "<ukn>": 1}, 50, str))),
        "lacks <eos>",
    ),
    ("no start", "vocabulary", lambda path: path.write_text(json.dumps({"<eos>": 0, "<ukn>": 1})), "lacks <sos>"),
    (
        "a word twice",
        "vocabulary",
        lambda path: path.write_text(
            json.dumps({"words": [{"word": w, "idx": i} for i, w in enumerate(["<sos>", "<eos>", "<ukn>", "a", "a"])]})
        ),
        "twice",
    ),
]


@pytest.mark.parametrize(("which", "spoil", "said"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_wrong_file_is_a_clear_error_and_leaves_nothing(
    files: ModelFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    which: str,
    spoil: Callable[[Path], Any],
    said: str,
) -> None:
    spoil(getattr(files, which))
    assert_refused(files, tmp_path, monkeypatch, capsys, said)


def assert_refused(
    files: ModelFiles, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, said: str, *options: str
) -> None:
    before = sorted(folder.iterdir())
    output = folder / "new/checkpoint"
    with pytest.raises(SystemExit, match="2"):
        run(
            monkeypatch,
            *("--cnn-model", files.cnn, "--rnn-model", files.rnn, "--vocab", files.vocabulary, "-o", output),
            *options,
        )
    message = capsys.readouterr().err.splitlines()[-1]
    assert said in message
    assert len(message) < 500
    assert sorted(folder.iterdir()) == before


def test_files_in_each_others_place_are_recognised(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    decoder_twice = ModelFiles(files.rnn, files.rnn, files.vocabulary)
    assert_refused(decoder_twice, tmp_path, monkeypatch, capsys, "is a decoder: give it as --rnn-model")
    cnn_twice = ModelFiles(files.cnn, files.cnn, files.vocabulary)
    assert_refused(cnn_twice, tmp_path, monkeypatch, capsys, "is a CNN: give it as --cnn-model")


def test_a_cnn_that_was_cut_off_is_a_clear_error(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    spoilt = ModelFiles(tmp_path / "cnn.model", files.rnn, files.vocabulary)
    shutil.copyfile(files.cnn, spoilt.cnn)
    cut_off(spoilt.cnn)
    assert_refused(spoilt, tmp_path, monkeypatch, capsys, "damaged or cut off")


def test_a_cnn_needs_neither_its_classifier_nor_its_counters(tmp_path: Path) -> None:
    """Files that were stripped of what captioning does not use."""
    weights = {name: values for name, values in random_cnn(0).items() if name.split("/")[0] != "fc" and name[-2:] != "/N"}
    write_hdf5(tmp_path / "cnn.model", weights)
    assert torch.equal(read_encoder(tmp_path / "cnn.model").conv1.weight, torch.from_numpy(weights["conv1/W"]))


def test_a_pickle_is_never_run(files: ModelFiles, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    files.rnn.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ChainerFileError):
        read_decoder(files.rnn, read_vocabulary(files.vocabulary))
    assert not (tmp_path / "exploded").exists()


# -- vocabularies and languages


def vocabulary_file(path: Path, words: Any) -> Path:
    path.write_text(json.dumps(words, ensure_ascii=False), encoding="utf-8")
    return path


def test_both_forms_of_a_vocabulary_are_the_same(tmp_path: Path) -> None:
    plain = read_vocabulary(vocabulary_file(tmp_path / "a.json", WORDS))
    entries = [{"word": word, "idx": index, "freq": 3} for word, index in WORDS.items()]
    listed = read_vocabulary(vocabulary_file(tmp_path / "b.json", {"images": [], "captions": [], "words": entries}))
    assert plain == listed
    assert plain.encode(["<sos>", "word7", "<eos>", "unheard-of"]) == [4, 7, 2, 49]


def test_words_is_an_english_word_too(tmp_path: Path) -> None:
    words = {("words" if word == "word7" else word): index for word, index in WORDS.items()}
    assert read_vocabulary(vocabulary_file(tmp_path / "a.json", words)).index["words"] == 7


@pytest.mark.parametrize(
    ("file", "tokens", "code", "tokenization"),
    [
        ("mscoco_caption_train2014_processed_dic.json", 8850, "en", "word"),
        ("captions_train2014_cn_translation_processed_dic.json", 3092, "zh", "character"),
        ("captions_train2014_jp_translation_processed_dic.json", 2035, "ja", "character"),
        ("yjcaptions26k_clean_processed_dic.json", 2212, "ja", "character"),
    ],
)
def test_real_vocabularies(file: str, tokens: int, code: str, tokenization: str) -> None:
    if not (REAL_VOCABULARIES / file).is_file():
        pytest.skip("chainer-caption's vocabularies are not here: let CHAINER_CAPTION_DATA name its folder data/MSCOCO")
    vocabulary = read_vocabulary(REAL_VOCABULARIES / file)
    (language,) = languages_of(vocabulary)
    assert (len(vocabulary), language.code, language.tokenization) == (tokens, code, tokenization)
    assert language.start_token == "<sos>"


def test_the_language_of_a_vocabulary_is_seen_from_its_script(tmp_path: Path) -> None:
    """Stands in for the real vocabularies, which are not everybody's to copy."""

    def language(words: str) -> tuple[str, str]:
        vocabulary = {word: index for index, word in enumerate(["<sos>", "<eos>", "<ukn>", *words.split()])}
        (found,) = languages_of(read_vocabulary(vocabulary_file(tmp_path / "dic.json", vocabulary)))
        return found.code, found.tokenization

    assert language("a dog runs") == ("en", "word")
    assert language("一 只 狗 在 草 地 上 奔 跑 ,") == ("zh", "character")
    assert language("犬 が 芝 生 を 走 っ て い る a") == ("ja", "character")
    assert language("犬 が 芝生 を 走って いる") == ("ja", "word")


MULTILINGUAL = {"<eos>": 0, "<jp>": 1, "<en>": 2, "<ukn>": 3, "dog": 4, "犬": 5, "が": 6}


def test_start_tokens_say_the_languages_of_a_multilingual_model(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(vocabulary_file(tmp_path / "dic.json", MULTILINGUAL))
    assert [(found.code, found.start_token) for found in languages_of(vocabulary)] == [("en", "<en>"), ("ja", "<jp>")]
    for given in (["ja", "en"], ["jp", "en=<en>"], ["ja=<jp>", "en"]):  # the first is the default
        assert [(found.code, found.start_token) for found in languages_of(vocabulary, given)] == [
            ("ja", "<jp>"),
            ("en", "<en>"),
        ]
    with_sos = read_vocabulary(vocabulary_file(tmp_path / "dic.json", MULTILINGUAL | {"<sos>": 7}))
    assert [found.code for found in languages_of(with_sos)] == ["en", "ja"]
    assert [found.start_token for found in languages_of(with_sos, ["en=<sos>"])] == ["<sos>"]


@pytest.mark.parametrize("given", [["fr"], ["fr=<fr>"], ["en=<eos>"], ["=<en>"], ["en", "en"], ["jp", "ja=<jp>"]])
def test_a_language_that_the_vocabulary_lacks_is_an_error(tmp_path: Path, given: list[str]) -> None:
    vocabulary = read_vocabulary(vocabulary_file(tmp_path / "dic.json", MULTILINGUAL))
    with pytest.raises(ChainerFileError, match=r"<en>|each language once"):
        languages_of(vocabulary, given)
