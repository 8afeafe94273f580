"""Let Java start faster: `python -m scripts.class_archive`, which the Dockerfile runs.

Java reads, checks and links TorchServe's classes anew with each start. Of those that one run has loaded it can write an
archive for the next (https://docs.oracle.com/en/java/javase/17/vm/class-data-sharing.html), and does so here: the service is
started, captions an image and is stopped. Java leaves an archive alone that is of another Java or of other jars, so at worst
it is of no use.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from scripts.probe import no_answer
from scripts.server import CLASS_ARCHIVE, CLASS_PATH, ServerError, TorchServe, free_settings


def is_current(archive: Path) -> bool:
    return archive.is_file() and archive.stat().st_mtime > max(path.stat().st_mtime for path in CLASS_PATH)


def create(archive: Path, settings: dict[str, str] | None = None) -> None:
    """Write the archive, from a run with the model of `config.properties` or of `settings`. Raises ServerError."""
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".class-archive-") as folder:
        made = Path(folder) / archive.name
        options = [f"-XX:ArchiveClassesAtExit={made}", "-Xlog:disable"]
        with TorchServe(free_settings() | (settings or {}), java_options=options) as server:
            server.wait_until_ready()
            _, reason = no_answer(server.address("inference"), server.model, timeout=30, key_file=server.key_file)
            if reason is not None:
                raise ServerError(f"no caption: {reason}")
        if not made.is_file():
            raise ServerError("Java has written no archive")
        made.replace(archive)


def main() -> None:
    if is_current(CLASS_ARCHIVE):
        return
    try:
        create(CLASS_ARCHIVE)
    except (OSError, ServerError) as error:
        print(f"Java starts as slowly as ever, since its class archive cannot be made: {error}", file=sys.stderr)
    else:
        print(f"{CLASS_ARCHIVE} written, {CLASS_ARCHIVE.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
