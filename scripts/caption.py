"""Caption image files and folders from the command line: `python -m scripts.caption --help`.

The same model, preprocessing and search as the service, without it. Exit status 1 says that some file got no caption.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from handler.captioner import Captioner, PreparedImage
from handler.checkpoint import load_checkpoint
from handler.contract import ModelInfo, Result, result_json
from handler.errors import CaptionError, InvalidImage
from handler.parameters import Parameters, describe, parse_parameters

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
BATCH = 8


def find_images(paths: list[Path]) -> list[Path]:
    """Files as they are given, folders as the images in and below them, sorted by name."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        else:
            found.append(path)
    return found


def caption_files(captioner: Captioner, files: list[Path], parameters: Parameters) -> list[Result]:
    """A result for each file; one that cannot be read or decoded leaves the others alone."""
    prepared = [_prepare(captioner, file) for file in files]
    good = [image for image in prepared if isinstance(image, PreparedImage)]
    captioned = iter(captioner.caption(good, [parameters] * len(good)))
    return [image if isinstance(image, CaptionError) else next(captioned) for image in prepared]


def _prepare(captioner: Captioner, file: Path) -> PreparedImage | CaptionError:
    try:
        return captioner.prepare(file.read_bytes())
    except CaptionError as error:
        return error
    except OSError as error:
        return InvalidImage(f"the file cannot be read: {error.strerror}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "weights/en", help="default: the embedded English model")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, as the service answers")
    for name, field in Parameters.model_fields.items():
        kind = str if name == "language" else float if "float" in str(field.annotation) else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=field.description)
    arguments = parser.parse_args()
    try:
        checkpoint = load_checkpoint(arguments.checkpoint)
        given = {name: getattr(arguments, name) for name in describe(checkpoint.config)}
        parameters = parse_parameters(
            {"num_captions": 1} | {k: v for k, v in given.items() if v is not None}, checkpoint.config
        )
    except CaptionError as error:
        parser.error(str(error))
    captioner = Captioner(checkpoint)
    model = ModelInfo(checkpoint.config.name, checkpoint.config.version, checkpoint.digest)
    files = find_images(arguments.images)
    if not files:
        parser.error("there are no images in these folders")
    failed = 0
    with tqdm(total=len(files), unit="image", disable=len(files) <= BATCH or not sys.stderr.isatty()) as bar:
        for start in range(0, len(files), BATCH):
            chunk = files[start : start + BATCH]
            for file, result in zip(chunk, caption_files(captioner, chunk, parameters), strict=True):
                failed += isinstance(result, CaptionError)
                with bar.external_write_mode():
                    _show(file, result, model, as_json=arguments.json)
            bar.update(len(chunk))
    if failed:
        sys.exit(f"{failed} of {len(files)} images got no caption")


def _show(file: Path, result: Result, model: ModelInfo, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"file": str(file)} | result_json(result, model), ensure_ascii=False))
    elif isinstance(result, CaptionError):
        print(f"{file}: {result.code}: {result}", file=sys.stderr)
    else:
        for caption in result.captions:
            print(f"{file}\t{caption.confidence:.3f}\t{caption.caption}")


if __name__ == "__main__":
    main()
