"""Score a checkpoint, or a running server, on photos with captions: `python -m scripts.evaluate --help`.

Photos go the whole way that a client's photo goes: decoding, encoder, beam search. The scores are pycocoevalcap's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import requests
import torch
from tqdm import tqdm

from handler.captioner import Captioner
from handler.checkpoint import load_checkpoint, write_atomically
from handler.config import LanguageConfig
from handler.errors import CaptionError
from handler.parameters import parse_parameters
from handler.vocabulary import tokenize
from scripts.datasets import Example, add_dataset_arguments, dataset_from, of_split
from scripts.metrics import Scores, distinct_share, plain_tokens, ptb_tokens, scores

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt

BATCH = 50
BINS = 10


class ServerError(CaptionError):
    """The server that is evaluated did not caption a photo."""


@dataclass(frozen=True)
class Captioned:
    """What was answered for a photo."""

    caption: str
    confidence: float


Answers = dict[int, list[Captioned]]
"""For each beam size the best caption of each photo."""


def by_checkpoint(captioner: Captioner, photos: Sequence[Path], beams: Sequence[int], length_penalty: float | None) -> Answers:
    """Caption with a loaded model; each photo is encoded once."""
    given = {} if length_penalty is None else {"length_penalty": length_penalty}
    answers: Answers = {beam: [] for beam in beams}
    with tqdm(total=len(photos), unit="photo") as bar:
        for start in range(0, len(photos), BATCH):
            prepared = [captioner.prepare(path.read_bytes()).pixels for path in photos[start : start + BATCH]]
            features = captioner.encode(prepared)
            for beam in beams:
                parameters = parse_parameters({"beam_size": beam, "num_captions": 1, **given}, captioner.config)
                for best, *_ in captioner.search(features, [parameters] * len(features)):
                    answers[beam].append(Captioned(best.caption, best.confidence))
            bar.update(len(prepared))
    return answers


def by_server(url: str, photos: Sequence[Path], beams: Sequence[int], length_penalty: float | None) -> Answers:
    """Caption with a running service; raises ServerError when it does not answer with a caption."""

    def post(path: Path, beam: int) -> Captioned:
        fields: dict[str, Any] = {"beam_size": beam, "num_captions": 1}
        if length_penalty is not None:
            fields["length_penalty"] = length_penalty
        try:
            response = requests.post(url, files={"image": path.read_bytes()}, data=fields, timeout=60)
            content = response.json()
        except (requests.RequestException, ValueError) as error:
            raise ServerError(f"{url} does not answer as a caption service does: {error}") from error
        if response.status_code != 200:
            raise ServerError(f"{url} answers {path} with status {response.status_code}: {content}")
        best = content["captions"][0]
        return Captioned(best["caption"], best["confidence"])

    with ThreadPoolExecutor(4) as pool, tqdm(total=len(photos) * len(beams), unit="photo") as bar:

        def one(path: Path, beam: int) -> Captioned:
            found = post(path, beam)
            bar.update()
            return found

        return {beam: list(pool.map(lambda path, beam=beam: one(path, beam), photos)) for beam in beams}


@dataclass(frozen=True)
class Evaluation:
    """The captions of one beam size, judged."""

    beam: int
    metrics: dict[str, float]
    mean_length: float
    vocabulary_used: int
    distinct_captions: float
    calibration: list[dict[str, float]]
    """Photos in bins of equal size by confidence: mean confidence, share of the caption's words that a reference has,
    CIDEr, number of photos."""
    calibration_error: float
    """Mean distance of the confidence from that share of words, over all bins (expected calibration error)."""


def evaluate(
    examples: Sequence[Example],
    answers: Answers,
    language: LanguageConfig,
    tokens: Callable[[Sequence[Sequence[str]], LanguageConfig], dict[int, list[str]]] = ptb_tokens,
) -> tuple[list[Evaluation], dict[int, Scores]]:
    """Judge the captions of every beam size."""
    references = tokens([e.captions for e in examples], language)
    meteor = tokens is ptb_tokens and language.code.startswith("en")
    found, all_scores = [], {}
    for beam, captioned in answers.items():
        result = scores(references, tokens([[c.caption] for c in captioned], language), meteor=meteor)
        words = [tokenize(c.caption, language.tokenization) for c in captioned]
        bins = calibration(examples, captioned, result.cider, language)
        found.append(
            Evaluation(
                beam=beam,
                metrics=result.metrics,
                mean_length=float(np.mean([len(w) for w in words])),
                vocabulary_used=len({word for w in words for word in w}),
                distinct_captions=distinct_share(c.caption for c in captioned),
                calibration=bins,
                calibration_error=sum(abs(b["confidence"] - b["words"]) * b["photos"] for b in bins) / len(examples),
            )
        )
        all_scores[beam] = result
    return found, all_scores


def calibration(
    examples: Sequence[Example], captioned: Sequence[Captioned], cider: Sequence[float], language: LanguageConfig
) -> list[dict[str, float]]:
    """Does a higher confidence mean a better caption? See `Evaluation.calibration`."""
    named = [{w for text in e.captions for w in tokenize(text, language.tokenization)} for e in examples]
    words = [tokenize(c.caption, language.tokenization) for c in captioned]
    shares = np.array([np.mean([word in known for word in w]) if w else 0.0 for w, known in zip(words, named, strict=True)])
    confidence, scored = np.array([c.confidence for c in captioned]), np.array(cider)
    parts = np.array_split(confidence.argsort(), min(BINS, len(captioned)))
    return [
        {
            "confidence": float(confidence[part].mean()),
            "words": float(shares[part].mean()),
            "CIDEr": float(scored[part].mean()),
            "photos": len(part),
        }
        for part in parts
    ]


def as_markdown(found: Sequence[Evaluation], about: dict[str, Any]) -> str:
    """The per-beam table and the calibration of the first beam size."""
    names = list(found[0].metrics)
    lines = [
        f"`{about['subject']}` on {about['photos']} photos of the split `{about['split']}`",
        "",
        "| beam | " + " | ".join(names) + " | words | vocabulary used | distinct captions | calibration error |",
        "| --- |" + " --- |" * (len(names) + 4),
    ]
    for e in found:
        values = [f"{e.metrics[name]:.3f}" for name in names]
        values += [f"{e.mean_length:.1f}", str(e.vocabulary_used), f"{e.distinct_captions:.0%}", f"{e.calibration_error:.3f}"]
        lines.append(f"| {e.beam} | " + " | ".join(values) + " |")
    lines += [
        "",
        f"Confidence and quality at beam {found[0].beam}, in bins of equal size:",
        "",
        "| confidence | words that a reference has | CIDEr | photos |",
        "| --- | --- | --- | --- |",
    ]
    for b in found[0].calibration:
        lines.append(f"| {b['confidence']:.2f} | {b['words']:.0%} | {b['CIDEr']:.2f} | {b['photos']} |")
    return "\n".join(lines) + "\n"


def draw(found: Sequence[Evaluation], answers: Answers, language: LanguageConfig, path: Path) -> None:
    """Reliability diagram and caption lengths as one PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for e in found:
        left.plot([b["confidence"] for b in e.calibration], [b["words"] for b in e.calibration], ".-", label=f"beam {e.beam}")
        right.hist(
            [len(c.caption.split()) for c in answers[e.beam]], bins=range(1, 25), histtype="step", label=f"beam {e.beam}"
        )
    left.set(xlabel="confidence", ylabel="share of words that a reference has", title="reliability", xlim=(0, 1), ylim=(0, 1))
    right.set(xlabel="tokens", ylabel="captions", title="length")
    left.legend()
    write_atomically(path, lambda part: figure.savefig(part, format="png", dpi=120))
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help="directory of a checkpoint")
    parser.add_argument("--url", help="instead of a checkpoint a server, such as http://127.0.0.1:8080/predictions/caption")
    add_dataset_arguments(parser)
    parser.add_argument("--on", default="dev", help="split to evaluate on")
    parser.add_argument("--beam", type=int, nargs="+", default=[3], help="beam sizes; all the tables' rows")
    parser.add_argument("--length-penalty", type=float, help="default: the model's own")
    parser.add_argument("--language", default="en", help="of the captions; with a checkpoint its own")
    parser.add_argument("--no-java", action="store_true", help="cut words as the model does: no METEOR, other scores close")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluation"), help="folder of the results")
    arguments = parser.parse_args()
    if (arguments.checkpoint is None) == (arguments.url is None):
        parser.error("give either a checkpoint or --url")
    try:
        run(arguments)
    except CaptionError as error:
        sys.exit(f"error: {error}")


def run(arguments: argparse.Namespace) -> None:
    """Raises CaptionError."""
    tokens = plain_tokens if arguments.no_java else ptb_tokens
    language = LanguageConfig(
        code=arguments.language, tokenization="character" if arguments.language in ("zh", "ja") else "word"
    )
    if arguments.checkpoint is not None:
        captioner = Captioner(load_checkpoint(arguments.checkpoint), device="cuda" if torch.cuda.is_available() else "cpu")
        language = captioner.config.languages[0]
    if tokens is ptb_tokens and language.code.startswith("en") and shutil.which("java") is None:
        raise CaptionError("pycocoevalcap needs Java for English: install openjdk-17-jre-headless, or give --no-java")
    examples = of_split(dataset_from(arguments), arguments.on)
    photos, beams = [e.path for e in examples], arguments.beam
    if arguments.checkpoint is None:
        answers = by_server(arguments.url, photos, beams, arguments.length_penalty)
    else:
        answers = by_checkpoint(captioner, photos, beams, arguments.length_penalty)
    found, all_scores = evaluate(examples, answers, language, tokens)

    about = {
        "subject": str(arguments.checkpoint or arguments.url),
        "digest": captioner.digest if arguments.checkpoint is not None else None,
        "split": arguments.on,
        "photos": len(examples),
        "length_penalty": arguments.length_penalty,
    }
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    captions = {
        beam: {p.name: {**asdict(c), "CIDEr": s} for p, c, s in zip(photos, answers[beam], all_scores[beam].cider, strict=True)}
        for beam in beams
    }
    table = as_markdown(found, about)
    _write(output / "evaluation.json", json.dumps(about | {"beams": [asdict(e) for e in found]}, indent=1))
    _write(output / "captions.json", json.dumps(captions, indent=1, ensure_ascii=False))
    _write(output / "evaluation.md", table)
    draw(found, answers, language, output / "evaluation.png")
    print(f"{table}\nall of it: {output}/evaluation.json, .md, .png and captions.json")


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
