"""Do the engines give the same captions, and what does their precision cost? `python -m scripts.engines --help`.

The same photos are captioned by every engine that works here, and each is compared with eager torch in fp32, and with itself
on the same photos compressed once more.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pycocoevalcap.cider.cider import Cider
from tqdm import tqdm

from handler.captioner import Caption, Captioner, load_captioner
from handler.config import EngineName, LanguageConfig, ServingConfig
from handler.errors import CaptionError
from handler.parameters import parse_parameters
from scripts.datasets import Example, add_dataset_arguments, dataset_from, of_split
from scripts.export import export
from scripts.features import saved_once_more
from scripts.metrics import plain_tokens

REFERENCE: EngineName = "torch-fp32"
ENGINES: dict[str, tuple[EngineName, ...]] = {
    "cpu": (REFERENCE, "torch-bf16", "openvino-fp32", "openvino-bf16", "openvino-int8"),
    "cuda": (REFERENCE, "torch-bf16", "torch-fp16"),
}
"""By kind of device."""
BATCH = 8


@dataclass(frozen=True)
class Agreement:
    """An engine's captions against the reference's, of the same photos."""

    engine: str
    photos: int
    same: int
    """Photos whose best caption is the same, word by word."""
    difference: float
    """The largest difference of the log-likelihoods of captions that are the same."""
    cider: float
    kept: int
    """Photos whose best caption stays the same when they are saved once more as a JPEG."""


def captioners(checkpoint: Path, folder: Path, engines: Sequence[EngineName], device: str = "cpu") -> dict[str, Captioner]:
    """One for each engine that this machine and checkpoint allow; `folder` takes what has to be exported."""
    if device == "cpu":
        export(checkpoint, folder)
    found: dict[str, Captioner] = {}
    for name in engines:
        captioner = load_captioner(checkpoint, folder, ServingConfig(engine=name), device=device, environment={})
        if captioner.engine.name == name:
            found[name] = captioner
    return found


def best_captions(
    captioner: Captioner, photos: Sequence[Path], read: Callable[[Path], bytes] = Path.read_bytes
) -> list[Caption]:
    """The best caption of each photo, with the model's default settings."""
    parameters = parse_parameters({"num_captions": 1}, captioner.config)
    best: list[Caption] = []
    for start in tqdm(range(0, len(photos), BATCH), desc=captioner.engine.name, unit="batch", leave=False):
        pixels = [captioner.prepare(read(path)).pixels for path in photos[start : start + BATCH]]
        found = captioner.search(captioner.encode(pixels), [parameters] * len(pixels))
        best += [captions[0] for captions in found]
    return best


def cider(captions: Sequence[Caption], examples: Sequence[Example], language: LanguageConfig) -> float:
    references = plain_tokens([e.captions for e in examples], language)
    return float(Cider().compute_score(references, plain_tokens([[c.caption] for c in captions], language))[0])


def compare(loaded: dict[str, Captioner], examples: Sequence[Example]) -> list[Agreement]:
    """loaded: by engine, the reference among them."""
    photos, language = [e.path for e in examples], loaded[REFERENCE].config.languages[0]
    captions = {name: best_captions(captioner, photos) for name, captioner in loaded.items()}
    found = []
    for name, ours in captions.items():
        pairs = [(a, b) for a, b in zip(ours, captions[REFERENCE], strict=True) if a.caption == b.caption]
        difference = max((abs(a.log_likelihood - b.log_likelihood) for a, b in pairs), default=0.0)
        again = best_captions(loaded[name], photos, saved_once_more)
        kept = sum(a.caption == b.caption for a, b in zip(ours, again, strict=True))
        found.append(Agreement(name, len(photos), len(pairs), difference, cider(ours, examples, language), kept))
    return found


def as_markdown(found: Sequence[Agreement]) -> str:
    lines = [
        f"| engine | photos | same caption as {REFERENCE} | log-likelihood differs by at most | CIDEr | caption kept as JPEG |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [f"| {a.engine} | {a.photos} | {a.same} | {a.difference:.1g} | {a.cider:.4f} | {a.kept} |" for a in found]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("weights/en"))
    add_dataset_arguments(parser)
    parser.add_argument("--on", default="dev", help="split of the photos")
    parser.add_argument("--photos", type=int, default=200, help="how many of them at most")
    arguments = parser.parse_args()
    try:
        examples = of_split(dataset_from(arguments), arguments.on)[: arguments.photos]
        with tempfile.TemporaryDirectory(prefix="engines-") as folder:
            loaded = captioners(arguments.checkpoint, Path(folder), ENGINES["cpu"])
            for missing in sorted(set(ENGINES["cpu"]) - set(loaded)):
                print(f"{missing} does not work here, or was not made", file=sys.stderr)
            if torch.cuda.is_available():
                on_gpu = captioners(arguments.checkpoint, Path(folder), ENGINES["cuda"], "cuda")
                loaded |= {f"{name} on {torch.cuda.get_device_name()}": captioner for name, captioner in on_gpu.items()}
            print(as_markdown(compare(loaded, examples)))
    except CaptionError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
