"""Training learns, goes on after an interruption to the same numbers, and leaves a checkpoint that captions."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from handler.captioner import Captioner
from handler.checkpoint import load_checkpoint, write_safetensors
from handler.config import DecoderConfig, ModelConfig, PreprocessingConfig
from handler.decoder import Decoder
from handler.encoder import Encoder
from handler.parameters import parse_parameters
from handler.vocabulary import Vocabulary
from scripts.datasets import Example
from scripts.features import FeatureCache
from scripts.toy_dataset import make
from scripts.training import Split, TrainConfig, Trainer, grow, restricted, standardized

WORDS = ("red", "green", "blue", "round", "square", "flat")
ROOT = Path(__file__).resolve().parent.parent


def a_split(photos: int, seed: int) -> Split:
    """Photos whose features say which two words their captions have."""
    chance = np.random.default_rng(seed)
    colour, shape = chance.integers(0, 3, photos), chance.integers(3, 6, photos)
    features = np.abs(chance.normal(0, 0.3, (photos, 2048))).astype(np.float16)
    features[np.arange(photos), colour] += 4
    features[np.arange(photos), shape] += 4
    captions = [
        (f"a {WORDS[c]} thing that is {WORDS[s]}", f"{WORDS[s]} and {WORDS[c]}") for c, s in zip(colour, shape, strict=True)
    ]
    resaved = FeatureCache([np.abs(features[:5] + chance.normal(0, 0.1, (5, 2048)).astype(np.float16))])
    return Split([Example(Path("none"), texts) for texts in captions], [FeatureCache([features])], resaved)


VOCABULARY = Vocabulary.build([["a", "thing", "that", "is", "and", *WORDS]], min_count=1)


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    torch.manual_seed(0)
    write_safetensors(path, Encoder(ModelConfig(decoder=DecoderConfig(vocabulary_size=3)).encoder).state_dict(), half=True)
    return path


def a_trainer(
    run: Path,
    encoder_path: Path,
    start_from: Decoder | None = None,
    vocabulary: Vocabulary = VOCABULARY,
    teacher: Decoder | None = None,
    size: int = 24,
    **settings: Any,
) -> Trainer:
    run.mkdir(parents=True, exist_ok=True)
    decoder = DecoderConfig(vocabulary_size=len(vocabulary), embedding_size=size, hidden_size=size, dropout=0.1)
    settings = {"epochs": 8, "cider_epochs": 2, "batch": 16, "cider_batch": 16, "views": 1, "learning_rate": 1e-2} | settings
    return Trainer(
        run,
        TrainConfig(**settings),
        ModelConfig(decoder=decoder),
        vocabulary,
        train=a_split(60, 0),
        dev=a_split(20, 1),
        encoder=Encoder(ModelConfig(decoder=decoder).encoder),
        encoder_path=encoder_path,
        start_from=start_from,
        teacher=teacher,
    )


def without_times(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in log]


def test_it_learns_and_exports_what_it_learned(tmp_path: Path, encoder_path: Path) -> None:
    trainer = a_trainer(tmp_path / "run", encoder_path, cider_epochs=0, epochs=12)
    trainer.run_to_end()
    losses = [row["loss"] for row in trainer.log]
    assert losses[-1] < 0.6 * losses[0]
    assert trainer.best["CIDEr"] > 1
    _, reached = trainer.export(tmp_path / "run/best")
    assert reached["CIDEr"] >= trainer.best["CIDEr"]

    captioner = Captioner(load_checkpoint(tmp_path / "run/best"))
    dev = trainer.dev_split
    features = dev.views[0][torch.arange(len(dev.examples))].numpy()
    parameters = parse_parameters({"beam_size": 3, "num_captions": 1}, captioner.config)
    served = [best.caption for (best, *_) in captioner.search(features, [parameters] * len(features))]
    expected = [" ".join(tokens) for tokens in trainer.caption_dev(reached["length_penalty"])]
    assert sum(a == b for a, b in zip(served, expected, strict=True)) >= 19  # fp16 weights may turn a close decision


def test_self_critical_training_raises_the_reward(tmp_path: Path, encoder_path: Path) -> None:
    trainer = a_trainer(tmp_path, encoder_path, epochs=3, cider_epochs=6, cider_learning_rate=5e-3, patience=9)
    trainer.run_to_end()
    before = max(row["CIDEr"] for row in trainer.log if row["stage"] == "captions")
    assert max(row["CIDEr"] for row in trainer.log if row["stage"] == "cider") > before


def test_interpolation_learns_the_best_of_the_models_own_captions(tmp_path: Path, encoder_path: Path) -> None:
    settings = {"epochs": 16, "cider_epochs": 0, "interpolation_epochs": 30, "patience": 99}
    trainer = a_trainer(tmp_path, encoder_path, interpolation_learning_rate=1e-2, **settings)

    def said() -> float:
        """The share of photos for which the likeliest caption is the one chosen."""
        found = trainer._search(trainer.train_split, 5, 0.0)
        end = VOCABULARY.end_index
        return float(np.mean([one[0].tokens == (*t, end) for one, t in zip(found, trainer.targets, strict=True)]))

    while trainer.stage_index < 2:
        trainer._train_epoch("captions", 300) if trainer.epoch < 16 else trainer._next_stage()
    for photo, found in enumerate(trainer._search(trainer.train_split, 5, trainer._best_length_penalty()[0])):
        rewards = [trainer.reward(photo, trainer._words(one.tokens)) for one in found]
        assert trainer.reward(photo, trainer._words([*trainer.targets[photo], VOCABULARY.end_index])) == max(rewards)
    before, judged = said(), trainer._judge()["CIDEr"]
    trainer.run_to_end()
    assert said() > before + 0.1
    assert trainer.best["CIDEr"] >= judged


def test_a_smaller_decoder_learns_what_its_teacher_says(tmp_path: Path, encoder_path: Path) -> None:
    large = a_trainer(tmp_path / "large", encoder_path, epochs=16, cider_epochs=0, patience=99)
    large.run_to_end()
    large.export(tmp_path / "teacher")
    teacher = load_checkpoint(tmp_path / "teacher").decoder
    fewer = Vocabulary(**{**VOCABULARY.model_dump(), "tokens": [t for t in VOCABULARY.tokens if t != "that"]})
    small = a_trainer(
        tmp_path / "small", encoder_path, None, fewer, restricted(teacher, [VOCABULARY.index[t] for t in fewer.tokens]), 16,
        epochs=0, cider_epochs=0, interpolation_epochs=40, interpolation_learning_rate=1e-2, patience=99,
    )  # fmt: skip
    small.run_to_end()
    penalty, _ = small._best_length_penalty(small.teacher)
    chosen = [(*tokens, fewer.end_index) for tokens in small.targets]
    by_teacher = [{one.tokens for one in found} for found in small._search(small.train_split, 5, penalty, small.teacher)]
    assert all(tokens in found for tokens, found in zip(chosen, by_teacher, strict=True))
    by_pupil = [found[0].tokens for found in small._search(small.train_split, 5, 0.0)]
    assert np.mean([said in found for said, found in zip(by_pupil, by_teacher, strict=True)]) > 0.9
    assert small.best["CIDEr"] > 0.9 * large.best["CIDEr"]


def test_a_length_penalty_that_only_chance_favours_is_not_taken(
    tmp_path: Path, encoder_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = a_trainer(tmp_path, encoder_path)
    for reached, expected in (({0.0: 0.991, 0.5: 1.0}, 0.0), ({0.0: 0.98, 0.5: 0.991, 1.25: 1.0}, 0.5), ({1.5: 1.0}, 1.5)):
        monkeypatch.setattr(trainer, "_judge", lambda penalty, _, reached=reached: {"CIDEr": reached.get(penalty, 0.9)})
        assert trainer._best_length_penalty() == (expected, {"CIDEr": reached[expected]})


def test_interpolation_with_what_was_likely_before_leaves_doubt_where_there_was_some(
    tmp_path: Path, encoder_path: Path
) -> None:
    """People say it in two ways; learned alone, the chosen one would make the model sure of it."""
    likelihoods = {}
    for share in (0.3, 1.0):
        trainer = a_trainer(
            tmp_path / str(share), encoder_path, epochs=16, cider_epochs=0, interpolation_epochs=30, interpolation_share=share,
            interpolation_learning_rate=1e-2, patience=99,
        )  # fmt: skip
        trainer.run_to_end()
        found = [one[0] for one in trainer._search(trainer.train_split, 3, 0.0)]
        likelihoods[share] = float(np.exp([np.mean(one.log_likelihoods) for one in found]).mean())
    assert likelihoods[0.3] < likelihoods[1.0] - 0.1


def test_noise_is_what_saving_once_more_does_to_features(tmp_path: Path, encoder_path: Path) -> None:
    trainer, photos = a_trainer(tmp_path, encoder_path), torch.arange(40)
    plain = trainer._features(photos)
    assert torch.equal(plain, trainer._features(photos))
    at_most = 2 * trainer.noise.abs().max(0).values / trainer.std
    added = (trainer._features(photos, noise=2.0) - plain).abs()
    assert (added <= at_most + 1e-4).all()
    assert (added.amax(1) > 0).all()


class Killed(Exception):
    pass


@pytest.mark.parametrize("interrupted_at", [3, 60, 66, 75])
def test_an_interrupted_run_reaches_the_same_numbers(
    tmp_path: Path, encoder_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_at: int
) -> None:
    whole = a_trainer(tmp_path / "whole", encoder_path, interpolation_epochs=2)
    whole.run_to_end()

    steps = 0
    plain = Trainer._set_learning_rate

    def failing(self: Trainer, *arguments: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == interrupted_at:
            raise Killed
        plain(self, *arguments)

    broken = a_trainer(tmp_path / "broken", encoder_path, interpolation_epochs=2)
    monkeypatch.setattr(Trainer, "_set_learning_rate", failing)
    with pytest.raises(Killed):
        broken.run_to_end(save_every_seconds=0)
    monkeypatch.setattr(Trainer, "_set_learning_rate", plain)
    torch.manual_seed(99)
    resumed = a_trainer(tmp_path / "broken", encoder_path, interpolation_epochs=2)
    resumed.run_to_end()
    assert without_times(resumed.log) == without_times(whole.log)
    for name, value in whole.best["weights"].items():
        assert torch.equal(value, resumed.best["weights"][name])


def test_standardisation_is_folded_into_the_decoder() -> None:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocabulary_size=9, feature_size=5, embedding_size=4, hidden_size=4)).eval()
    features, mean, std = torch.randn(3, 5), torch.randn(5), torch.rand(5) + 0.5
    tokens = torch.randint(0, 9, (3, 4))
    torch.testing.assert_close(
        standardized(decoder, mean, std)(features, tokens), decoder((features - mean) / std, tokens), rtol=1e-4, atol=1e-5
    )


def test_a_trained_model_is_where_training_starts_and_what_it_has_to_beat(tmp_path: Path, encoder_path: Path) -> None:
    first = a_trainer(tmp_path / "first", encoder_path, cider_epochs=0, epochs=12)
    first.run_to_end()
    first.export(tmp_path / "begun")
    begun = load_checkpoint(tmp_path / "begun").decoder
    larger = VOCABULARY.extended([["new", "thing"]], min_count=1)
    further = a_trainer(tmp_path / "further", encoder_path, begun, larger, epochs=1, cider_epochs=0, learning_rate=1.0)
    assert further.best["CIDEr"] == pytest.approx(first.best["CIDEr"], abs=1e-3)
    assert further.caption_dev() == first.caption_dev()
    further.run_to_end()  # which such a learning rate ruins
    assert further.log[0]["CIDEr"] < further.best["CIDEr"]
    further.export(tmp_path / "best")
    assert further.caption_dev() == first.caption_dev()
    assert load_checkpoint(tmp_path / "best").vocabulary.tokens[-1] == "new"


def test_new_tokens_change_nothing_for_those_that_were_known() -> None:
    sizes = {"embedding_size": 8, "hidden_size": 12}
    small, large = (Decoder(DecoderConfig(vocabulary_size=size, **sizes)).eval() for size in (9, 11))
    grow(large, small)
    features, tokens = torch.randn(3, 2048), torch.randint(0, 9, (3, 4))
    logits = large(features, tokens)
    torch.testing.assert_close(logits[:, :, :9], small(features, tokens))
    assert (logits[:, :, 9:] == small.output.bias.min()).all()


def test_a_decoder_restricted_to_some_tokens_says_the_same_of_them() -> None:
    decoder = Decoder(DecoderConfig(vocabulary_size=9, embedding_size=8, hidden_size=12)).eval()
    features, tokens = torch.randn(3, 2048), torch.randint(0, 4, (3, 4))
    kept = [7, 0, 3, 8]
    expected = decoder(features, torch.tensor(kept)[tokens])[:, :, kept]
    torch.testing.assert_close(restricted(decoder, kept)(features, tokens), expected)


def test_the_encoder_is_trained_with_its_own_rate(tmp_path: Path, encoder_path: Path) -> None:
    make(tmp_path / "toy", photos=6)
    paths = sorted((tmp_path / "toy/photos").iterdir())
    examples = [Example(path, ("a red thing",)) for path in paths]
    cache = FeatureCache([np.random.default_rng(0).random((6, 2048)).astype(np.float16)])
    decoder = DecoderConfig(vocabulary_size=len(VOCABULARY), embedding_size=8, hidden_size=8)
    model = ModelConfig(decoder=decoder, preprocessing=PreprocessingConfig(size=32))
    encoder = Encoder(model.encoder)
    before = encoder.conv1.weight.detach().clone()
    statistics = encoder.bn1.running_mean.clone()
    config = TrainConfig(epochs=1, batch=3, encoder_learning_rate=1e-3, views=2)
    split = Split(examples, [cache])
    trainer = Trainer(tmp_path, config, model, VOCABULARY, train=split, dev=split, encoder=encoder, encoder_path=encoder_path)
    trainer.run_to_end()
    assert not torch.equal(before, trainer.net.encoder.conv1.weight.cpu())
    assert torch.equal(statistics, trainer.net.encoder.bn1.running_mean.cpu())
    trainer.export(tmp_path / "best")
    assert load_checkpoint(tmp_path / "best").encoder.conv1.weight.shape == before.shape


def train_command(run: Path, toy: Path, encoder: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "scripts.train", str(run), "--images", str(toy / "photos")),
        *("--captions", str(toy / "captions.csv"), "--cache", str(toy / "features"), "--encoder", str(encoder)),
        *("--size", "64", "--min-count", "1", "--batch", "8", "--patience", "99"),
        *("--epochs", "30", "--cider-epochs", "2", "--interpolation-epochs", "1"),
        *("--hidden-size", "32", "--embedding-size", "32"),
    ]


@pytest.mark.slow
def test_kill_9_and_resume_over_the_command_line(tmp_path: Path, encoder_path: Path) -> None:
    toy = tmp_path / "toy"
    make(toy, photos=40)
    subprocess.run(train_command(tmp_path / "whole", toy, encoder_path), check=True, cwd=ROOT)
    log = tmp_path / "killed/log.jsonl"
    process = subprocess.Popen(train_command(tmp_path / "killed", toy, encoder_path), cwd=ROOT)
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(log.read_text().splitlines()) < 32
    subprocess.run(train_command(tmp_path / "killed", toy, encoder_path), check=True, cwd=ROOT)

    def rows(run: str) -> list[dict[str, Any]]:
        return without_times([json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()])

    assert rows("killed") == rows("whole")
    for name in ("curves.png", "report.html", "command.json", "vocabulary.json", "best/checkpoint.json"):
        assert (tmp_path / "killed" / name).stat().st_size > 0
    changed = subprocess.run(
        [*train_command(tmp_path / "killed", toy, encoder_path), "--seed", "5"], capture_output=True, text=True, cwd=ROOT
    )
    assert changed.returncode != 0
    assert "seed" in changed.stderr


@pytest.mark.slow
def test_a_model_is_trained_further_over_the_command_line(tmp_path: Path, encoder_path: Path) -> None:
    toy = tmp_path / "toy"
    make(toy, photos=40)
    subprocess.run(train_command(tmp_path / "first", toy, encoder_path), check=True, cwd=ROOT)
    captions = toy / "captions.csv"
    captions.write_text(captions.read_text().replace("background", "wall"))
    further = [
        *(sys.executable, "-m", "scripts.train", str(tmp_path / "further"), "--start-from", str(tmp_path / "first/best")),
        *("--images", str(toy / "photos"), "--captions", str(captions), "--cache", str(toy / "features")),
        *("--min-count", "1", "--epochs", "8", "--batch", "8", "--learning-rate", "5e-3"),
    ]
    done = subprocess.run(further, check=True, cwd=ROOT, capture_output=True, text=True)
    assert "before any training: CIDEr" in done.stdout
    log = [json.loads(line) for line in (tmp_path / "further/log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    before, after = (load_checkpoint(tmp_path / name / "best") for name in ("first", "further"))
    assert after.config.preprocessing.size == before.config.preprocessing.size == 64
    assert after.vocabulary.tokens == (*before.vocabulary.tokens, "wall")
    taught = [
        *(sys.executable, "-m", "scripts.train", str(tmp_path / "taught"), "--teacher", str(tmp_path / "further/best")),
        *(*further[6:12], "--hidden-size", "16", "--embedding-size", "16", "--epochs", "0"),
    ]
    subprocess.run([*taught, "--min-count", "30", "--interpolation-epochs", "2"], check=True, cwd=ROOT)
    small = load_checkpoint(tmp_path / "taught/best")
    assert (small.config.decoder.hidden_size, small.config.preprocessing) == (16, after.config.preprocessing)
    assert set(small.vocabulary.tokens) < set(after.vocabulary.tokens)
    nothing = subprocess.run([*further, "--epochs", "0"], capture_output=True, text=True, cwd=ROOT)
    assert nothing.returncode != 0
    assert "--epochs 0 needs" in nothing.stderr
    refused = subprocess.run(
        [*further[:3], str(tmp_path / "other"), *further[4:], "--encoder", str(ROOT / "weights/encoder.safetensors")],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert refused.returncode != 0
    assert "another encoder" in refused.stderr
    captions.write_text(captions.read_text().replace("wall", "curtain"))
    for more, why in (([], "needs --interpolation-epochs"), (["--interpolation-epochs", "1"], "does not know curtain")):
        refused = subprocess.run(
            [*taught[:3], str(tmp_path / "untaught"), *taught[4:], *more, "--min-count", "1"],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert refused.returncode != 0
        assert why in refused.stderr
