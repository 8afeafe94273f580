"""Pack a checkpoint and the handler into a model archive: `python -m scripts.package_mar --help`.

The same checkpoint and code give the same bytes, so an archive can be cached, compared and signed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import yaml

from handler.checkpoint import copy_checkpoint, read_manifest, write_atomically
from handler.errors import CheckpointError
from scripts.export import export, exporter, quantized

ROOT = Path(__file__).resolve().parent.parent
HANDLER = ROOT / "handler"
SITE = ROOT / "deploy/torchserve/sitecustomize.py"
ENTRY_POINT = "caption_handler.py"
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a zip file can hold."""


def package(checkpoint: Path, output: Path, *, name: str, model_config: Path) -> bool:
    """Write `output`, unless it holds these inputs already. Says whether it was written.

    The inputs' digest stands in the archive's zip comment. Raises CheckpointError.
    """
    manifest = read_manifest(checkpoint)
    wanted = _digest(f"{manifest.digest} {exporter()} {quantized(checkpoint)}", name, model_config)
    if output.is_file() and zipfile.is_zipfile(output):
        with zipfile.ZipFile(output) as archive:
            if archive.comment == wanted:
                return False
    with tempfile.TemporaryDirectory(prefix="package-") as folder:
        staged = Path(folder) / "files"
        shutil.copytree(HANDLER, staged / "handler", ignore=shutil.ignore_patterns("__pycache__", ENTRY_POINT))
        shutil.copy(SITE, staged)
        copy_checkpoint(checkpoint, staged / "checkpoint")
        export(checkpoint, staged / "engine")
        subprocess.run(
            [
                str(Path(sys.executable).with_name("torch-model-archiver")),
                *("--model-name", name),
                *("--version", manifest.config.version),
                *("--handler", str(HANDLER / ENTRY_POINT)),
                *("--extra-files", str(staged)),  # the folder's content, hence handler/ inside of it
                *("--config-file", str(model_config)),
                *("--export-path", folder),
                *("--archive-format", "zip-store"),
            ],
            check=True,
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, lambda part: _reproducible(Path(folder) / f"{name}.mar", part, comment=wanted))
    return True


def _digest(model: str, name: str, model_config: Path) -> bytes:
    digest = hashlib.sha256(f"{model} {name}\n".encode())
    for path in [Path(__file__), Path(__file__).with_name("export.py"), model_config, SITE, *sorted(HANDLER.glob("*.py"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest().encode()


def _reproducible(source: Path, target: Path, *, comment: bytes) -> None:
    """Copy a zip file with sorted entries and a fixed time: the archiver writes the present one everywhere."""
    with zipfile.ZipFile(source) as read, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as written:
        written.comment = comment
        for name in sorted(read.namelist()):
            content = read.read(name)
            if name == "MAR-INF/MANIFEST.json":
                manifest = json.loads(content) | {"createdOn": "01/01/1980 00:00:00"}
                content = json.dumps(manifest, indent=2, sort_keys=True).encode()
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            written.writestr(entry, content)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "weights/en", help="directory of a checkpoint")
    parser.add_argument("--name", default="caption", help="name under which TorchServe serves it")
    parser.add_argument("--output", type=Path, help="default: model_store/NAME.mar")
    parser.add_argument(
        "--model-config", type=Path, default=ROOT / "deploy/torchserve/model-config.yaml", help="workers, batching, limits"
    )
    arguments = parser.parse_args()
    output = arguments.output or ROOT / "model_store" / f"{arguments.name}.mar"
    try:
        yaml.safe_load(arguments.model_config.read_bytes())
        written = package(arguments.checkpoint, output, name=arguments.name, model_config=arguments.model_config)
    except (CheckpointError, OSError, yaml.YAMLError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"package_mar: {error}") from None
    print(f"{output} {'written' if written else 'is up to date'}, {output.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
