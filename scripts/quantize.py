"""Make the int8 encoder of a checkpoint: `python -m scripts.quantize --help`, and docs/performance.md.

`scripts.gptq` rounds the weights, NNCF's post-training quantization finds the ranges of the activations, both on calibration
photos. The result is written beside the checkpoint's encoder, where `scripts.package_mar` finds it, and only if captions lose
at most 0.5 % of CIDEr on photos with reference captions that were not calibrated on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from handler.captioner import Captioner, load_captioner
from handler.checkpoint import load_checkpoint
from handler.config import ServingConfig
from handler.errors import CaptionError
from handler.image import normalize
from handler.networks import load_encoder
from scripts.datasets import Example, add_dataset_arguments, dataset_from, of_split
from scripts.engines import best_captions, cider
from scripts.export import as_openvino, int8_directory, save_export
from scripts.gptq import rounded_to_int8

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
ROUNDING_PHOTOS = 160
"""Photos, or not twice as many: more take memory and change little. For the activations' ranges all are looked at."""
MAX_LOSS = 0.005
"""Of CIDEr, as a share."""


class QuantizationError(CaptionError):
    """The int8 encoder is not good enough, or cannot be made here."""


@dataclass(frozen=True)
class Comparison:
    """Captions by int8 against captions by fp32, of the same photos."""

    photos: int
    same: int
    """Photos whose best caption is the same, word by word."""
    cider: float
    quantized_cider: float

    @property
    def loss(self) -> float:
        return 1 - self.quantized_cider / self.cider if self.cider > 0 else 0.0


def quantize(checkpoint: Path, photos: Sequence[Path], directory: Path) -> None:
    """Write the int8 export of a checkpoint's encoder, calibrated on `photos`. Raises CaptionError."""
    try:
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet
    except ImportError:
        raise QuantizationError("NNCF is missing: pip install -r requirements/quantize.txt") from None
    captioner = Captioner(load_checkpoint(checkpoint))
    preprocessing = captioner.config.preprocessing
    pixels = torch.from_numpy(np.stack([captioner.prepare(path.read_bytes()).pixels for path in photos]))
    encoder = rounded_to_int8(
        load_encoder(checkpoint), normalize(pixels[:: len(pixels) // ROUNDING_PHOTOS or 1], preprocessing)
    )
    model = nncf.quantize(
        as_openvino(encoder, preprocessing),
        nncf.Dataset(list(pixels[:, None].numpy())),
        subset_size=len(pixels),
        # Weights symmetric, activations not, which costs nothing after a ReLU and keeps the range whole before one.
        preset=nncf.QuantizationPreset.MIXED,
        advanced_parameters=AdvancedQuantizationParameters(
            overflow_fix=OverflowFix.DISABLE,  # int8 is served only where nothing overflows
            disable_bias_correction=True,  # done while rounding
            # The photos' extremes on average: finer steps are worth more than what is cut off.
            activations_range_estimator_params=RangeEstimatorParametersSet.MEAN_MINMAX,
        ),
    )
    save_export(model, checkpoint, directory)


def compare(checkpoint: Path, engine: Path, examples: Sequence[Example]) -> Comparison:
    """Caption `examples` with fp32 and with int8, which is in `engine`. Raises QuantizationError where it cannot be run."""
    captioner = load_captioner(checkpoint, engine, ServingConfig(engine="openvino-int8"), environment={})
    if captioner.engine.name != "openvino-int8":
        raise QuantizationError("this machine cannot run the int8 encoder fast or exactly, so it cannot be judged here")
    photos, language = [e.path for e in examples], captioner.config.languages[0]
    plain, int8 = (best_captions(one, photos) for one in (Captioner(load_checkpoint(checkpoint)), captioner))
    same = sum(one.caption == other.caption for one, other in zip(plain, int8, strict=True))
    return Comparison(len(examples), same, cider(plain, examples, language), cider(int8, examples, language))


def calibration_photos(folder: Path, count: int) -> list[Path]:
    """`count` photos, drawn evenly over the sorted names. Raises QuantizationError when there are too few to judge by."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in PHOTO_SUFFIXES)
    if len(found) < min(count, 32):
        raise QuantizationError(f"{folder} has {len(found)} photos: calibration needs {min(count, 32)} or more, better 300")
    return [found[at] for at in np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("weights/en"))
    parser.add_argument("--calibrate", type=Path, required=True, help="folder of photos like those that will be captioned")
    parser.add_argument("--photos", type=int, default=300, help="how many of them at most")
    parser.add_argument("--on", default="dev", help="split that the captions are judged on")
    parser.add_argument("--judged", type=int, default=1000, help="photos of that split at most")
    add_dataset_arguments(parser)
    arguments = parser.parse_args()
    try:
        print(run(arguments))
    except CaptionError as error:
        sys.exit(f"error: {error}")


def run(arguments: argparse.Namespace) -> str:
    """Raises CaptionError."""
    examples = of_split(dataset_from(arguments), arguments.on)[: arguments.judged]
    judged = {e.path.resolve() for e in examples}
    photos = [p for p in calibration_photos(arguments.calibrate, arguments.photos) if p.resolve() not in judged]
    target = int8_directory(arguments.checkpoint)
    with tempfile.TemporaryDirectory(prefix="quantize-") as folder:
        made = Path(folder) / "int8"
        quantize(arguments.checkpoint, photos, made)
        found = compare(arguments.checkpoint, Path(folder), examples)
        verdict = (
            f"of {found.photos} captions {found.same} are the same; CIDEr {found.cider:.4f} in fp32, "
            f"{found.quantized_cider:.4f} in int8: a loss of {found.loss:.2%}"
        )
        if found.loss > MAX_LOSS:
            raise QuantizationError(f"{verdict}, more than {MAX_LOSS:.1%}. Nothing is written; calibrate on more photos")
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(made, target)
    size = sum(file.stat().st_size for file in target.iterdir()) / 2**20
    return f"{verdict}\n{os.path.relpath(target)}: {size:.0f} MiB. Packed by python -m scripts.package_mar"


if __name__ == "__main__":
    main()
