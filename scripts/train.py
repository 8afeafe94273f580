"""Train a captioner on photos with captions: `python -m scripts.train --help`, and docs/training.md.

RUN/command.json       what was asked for, the versions of all packages, the git commit
RUN/vocabulary.json    how often each token occurs, and what share of the text the vocabulary covers
RUN/log.jsonl          one line for each epoch
RUN/state.pt           all that a continuation needs: give the same command again
RUN/best/              the checkpoint with the best CIDEr on dev: caption, evaluate, package it
RUN/curves.png, RUN/report.html
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, get_args

import torch

from handler.checkpoint import Checkpoint, load_checkpoint, read_manifest, verified, write_atomically
from handler.config import (
    DecoderConfig,
    EncoderConfig,
    LanguageConfig,
    ModelConfig,
    PreprocessingConfig,
    SearchConfig,
    Tokenization,
)
from handler.decoder import Decoder
from handler.errors import CaptionError
from handler.vocabulary import START, Vocabulary, tokenize
from scripts.datasets import Example, add_dataset_arguments, dataset_from, of_split
from scripts.features import RESAVED, FeatureCache, cached_features, default_workers, load_encoder
from scripts.pretrained import TORCHVISION_WEIGHTS, torchvision_encoder
from scripts.report import draw_curves, write_report
from scripts.training import Split, TrainConfig, Trainer, restricted

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = "command.json"
RESAVED_PHOTOS = 1000
"""Of so many it is looked at what saving a photo once more does to its features."""


def count_vocabulary(
    examples: Sequence[Example], language: LanguageConfig, min_count: int, known_before: Vocabulary | None = None
) -> tuple[Vocabulary, dict[str, Any]]:
    """The tokens that occur at least `min_count` times, behind those known before, and the statistics of all."""
    captions = [tokenize(text, language.tokenization) for e in examples for text in e.captions]
    begun = known_before or Vocabulary.build([], min_count=1, start=(language.start_token,))
    vocabulary = begun.extended(captions, min_count=min_count)
    counts = Counter(token for caption in captions for token in caption)
    known = sum(n for token, n in counts.items() if token in vocabulary.index)
    statistics = {
        "captions": len(captions),
        "tokens": counts.total(),
        "different_tokens": len(counts),
        "min_count": min_count,
        "kept": len(vocabulary),
        "share_of_text_covered": round(known / max(1, counts.total()), 4),
        "mean_caption_length": round(counts.total() / len(captions), 2),
        "longest_caption": max(map(len, captions)),
        "counts": dict(counts.most_common()),
    }
    return vocabulary, statistics


def environment() -> dict[str, Any]:
    """What else the numbers of a run depend on."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "git": git.stdout.strip() or None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "packages": dict(sorted((d.metadata["Name"], d.version) for d in distributions())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run directory; made, or continued")
    add_dataset_arguments(parser)
    parser.add_argument(
        "--start-from",
        type=Path,
        help="checkpoint of a model to train further, such as weights/en; its language, tokenization and sizes hold then",
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        help="checkpoint of a model, larger as a rule, that --interpolation-epochs learn from; it must know all the tokens",
    )
    parser.add_argument(
        "--encoder",
        help=f"weights: a safetensors file, or {' or '.join(TORCHVISION_WEIGHTS)} from torchvision; "
        "otherwise that of --start-from or --teacher, or the embedded one",
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/features"), help="where features are kept")
    parser.add_argument("--name", default="caption", help="name of the model")
    parser.add_argument("--version", default="1.0", help="version of the model")
    parser.add_argument("--language", default="en", help="BCP 47 code of the captions' language")
    parser.add_argument("--tokenization", choices=get_args(Tokenization), default="word", help="character: Chinese, Japanese")
    parser.add_argument("--min-count", type=int, default=5, help="rarer tokens become the unknown one")
    parser.add_argument("--max-length", type=int, default=SearchConfig().max_length, help="tokens of a caption at most")
    parser.add_argument("--size", type=int, default=PreprocessingConfig().size, help="side of the encoder's input in pixels")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes that decode photos")
    decoder = {"embedding_size": 512, "hidden_size": 512, "dropout": 0.5}
    for name, default in decoder.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help="of the decoder")
    for name, field in TrainConfig.model_fields.items():
        kind = type(field.default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=field.default, help=field.description or " ")
    arguments = parser.parse_args()
    try:
        train(arguments)
    except (CaptionError, ValueError) as error:
        parser.error(str(error))


def train(arguments: argparse.Namespace) -> None:
    """Raises CaptionError, or ValueError for settings out of range."""
    config = TrainConfig(**{name: getattr(arguments, name) for name in TrainConfig.model_fields})
    if arguments.teacher and (arguments.start_from or config.encoder_learning_rate or not config.interpolation_epochs):
        raise ValueError("--teacher needs --interpolation-epochs, and goes with no --start-from or --encoder-learning-rate")
    trained: Path | None = arguments.start_from or arguments.teacher
    if not config.epochs and not (trained and config.cider_epochs + config.interpolation_epochs):
        raise ValueError("--epochs 0 needs a model to --start-from or --teacher, and --cider-epochs or --interpolation-epochs")
    asked = {name: str(value) for name, value in vars(arguments).items() if name != "run"}
    run: Path = arguments.run
    run.mkdir(parents=True, exist_ok=True)
    if (run / SETTINGS).exists():
        before = json.loads((run / SETTINGS).read_text())["arguments"]
        changed = [name for name in asked if before.get(name) != asked[name]]
        if changed:
            raise ValueError(f"{run} was begun with another {', '.join(changed)}: use a new run directory")
    settings = {"command": sys.argv, "arguments": asked, "training": config.model_dump(), "environment": environment()}
    _write_json(run / SETTINGS, settings)

    begun = load_checkpoint(arguments.start_from, with_encoder=False) if arguments.start_from else None
    teacher = load_checkpoint(arguments.teacher, with_encoder=False) if arguments.teacher else None
    earlier = begun or teacher
    if earlier is not None and len(earlier.config.languages) > 1:
        raise ValueError(f"{trained} has several languages: only a model of one can be trained further or teach")
    examples = dataset_from(arguments)
    language = earlier.config.languages[0] if earlier else _language(arguments)
    vocabulary, statistics = count_vocabulary(
        of_split(examples, "train"), language, arguments.min_count, begun.vocabulary if begun else None
    )
    _write_json(run / "vocabulary.json", statistics)
    teaching = _with_tokens(teacher, vocabulary) if teacher else None
    model = _model(arguments, earlier, language, len(vocabulary))
    encoder_path = _encoder_path(arguments)
    encoder, digest = load_encoder(encoder_path, model.encoder)
    if trained and digest != read_manifest(trained).files["encoder"].sha256:
        raise ValueError(f"{trained} was trained with another encoder than {encoder_path}: leave out --encoder")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(
        f"{device}: {statistics['captions']} captions, {len(vocabulary)} tokens cover "
        f"{statistics['share_of_text_covered']:.1%} of their text; at most {config.epochs} epochs of cross-entropy, "
        f"{config.cider_epochs} on CIDEr, {config.interpolation_epochs} on the best captions of "
        f"{arguments.teacher or 'its own'}; "
        f"the encoder is {'trained' if config.encoder_learning_rate else 'left as it is'}"
    )

    def features(chosen: Sequence[Example], view: int) -> FeatureCache:
        return cached_features(
            arguments.cache,
            encoder,
            model.preprocessing,
            [e.path for e in chosen],
            encoder_digest=digest,
            view=view,
            workers=arguments.workers,
            device=device,
        )

    train_split, dev_split = (of_split(examples, name) for name in ("train", "dev"))
    of_views = range(1 if config.encoder_learning_rate else config.views)
    noisy = config.interpolation_epochs and config.interpolation_noise and not config.encoder_learning_rate
    trainer = Trainer(
        run,
        config,
        model,
        vocabulary,
        train=Split(
            train_split,
            [features(train_split, view) for view in of_views],
            resaved=features(train_split[:RESAVED_PHOTOS], RESAVED) if noisy else None,
        ),
        dev=Split(dev_split, [features(dev_split, 0)]),
        encoder=encoder,
        encoder_path=encoder_path.resolve(),
        start_from=begun.decoder if begun else None,
        teacher=teaching,
    )
    trainer.run_to_end()
    checkpoint_digest, reached = trainer.export(run / "best")
    draw_curves(trainer.log, run / "curves.png")
    write_report(run, trainer, reached)
    print(
        f"dev: CIDEr {reached['CIDEr']:.3f}, BLEU-4 {reached['BLEU-4']:.3f} at beam {config.beam_size}, length penalty "
        f"{reached['length_penalty']}\ncheckpoint {run / 'best'}  {checkpoint_digest}\nreport     {run / 'report.html'}"
    )


def _language(arguments: argparse.Namespace) -> LanguageConfig:
    return LanguageConfig(code=arguments.language, start_token=START, tokenization=arguments.tokenization)


def _with_tokens(teacher: Checkpoint, vocabulary: Vocabulary) -> Decoder:
    """The teacher's decoder with the tokens of `vocabulary`."""
    unknown = [token for token in vocabulary.tokens if token not in teacher.vocabulary.index]
    if unknown:
        raise ValueError(f"the teacher does not know {', '.join(unknown[:5])}: a higher --min-count leaves out rarer tokens")
    return restricted(teacher.decoder, [teacher.vocabulary.index[token] for token in vocabulary.tokens])


def _model(
    arguments: argparse.Namespace, earlier: Checkpoint | None, language: LanguageConfig, vocabulary_size: int
) -> ModelConfig:
    """What is asked for; what is trained further, with room for new tokens; or the teacher in the size that is asked for."""
    decoder = DecoderConfig(
        vocabulary_size=vocabulary_size,
        embedding_size=arguments.embedding_size,
        hidden_size=arguments.hidden_size,
        dropout=arguments.dropout,
    )
    if earlier is not None:
        if arguments.start_from:
            decoder = earlier.config.decoder.model_copy(update={"vocabulary_size": vocabulary_size})
        return earlier.config.model_copy(update={"name": arguments.name, "version": arguments.version, "decoder": decoder})
    return ModelConfig(
        name=arguments.name,
        version=arguments.version,
        languages=(language,),
        preprocessing=PreprocessingConfig(size=arguments.size),
        encoder=EncoderConfig(),
        decoder=decoder,
        search=SearchConfig(max_length=arguments.max_length),
    )


def _encoder_path(arguments: argparse.Namespace) -> Path:
    if arguments.encoder in TORCHVISION_WEIGHTS:
        return torchvision_encoder(arguments.encoder, arguments.run / "encoder.safetensors")
    if arguments.encoder:
        return Path(arguments.encoder)
    if trained := arguments.start_from or arguments.teacher:
        return verified(trained, read_manifest(trained).files["encoder"])
    return ROOT / "weights/encoder.safetensors"


def _write_json(path: Path, content: object) -> None:
    write_atomically(path, lambda part: part.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8"))


if __name__ == "__main__":
    main()
