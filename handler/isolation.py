"""Decoding in a process of its own, for images that may take long, take much memory or crash a decoder.

Pillow cannot be interrupted while it decodes. So whatever is not small and of a simple format is decoded by a child that
has a memory limit, may write no file, and is killed at a deadline; the next image gets a new one. The worker is never at
risk. Small JPEG, PNG and WebP files, which is nearly all there is, are decoded in place, where they take milliseconds.

Only JSON and pixels come back from the child: whoever takes it over can send neither code nor objects.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import weakref
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from handler.config import DecodingConfig, ImageLimits, PreprocessingConfig
from handler.decoding import Costly, decode, fitted, is_simple, smallest_useful_side
from handler.errors import ImageTooLarge, InvalidImage, RequestError, UnsupportedFormat

INLINE_BYTES = 2**20
INLINE_PIXELS = 8_000_000
"""Up to these sizes a JPEG, PNG or WebP is decoded in place, the worst of them in less than a second."""

_CHILDS_ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).resolve().parents[1]),  # the package is found where this is
    "OPENBLAS_NUM_THREADS": "1",  # enough for numpy here, and each more reserves memory
    # The C library would give memory back after each photo and take it anew for the next, page by page, which takes a fifth
    # of the time of a phone's photo. So it keeps 32 MiB.
    "MALLOC_TRIM_THRESHOLD_": str(2**25),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
}
_ERRORS: dict[str, type[RequestError]] = {error.__name__: error for error in (InvalidImage, ImageTooLarge, UnsupportedFormat)}


@dataclass(frozen=True)
class FittedImage:
    """A photo at the model's size, and what its file said of itself."""

    pixels: np.ndarray
    """(size, size, 3), uint8, RGB"""
    width: int
    height: int
    format: str


class ImageReader:
    """Decodes image files and brings them to a model's size. Safe to use from several threads.

    At most one child exists; images that need it wait for each other, so that its memory limit is the worker's, too.
    """

    def __init__(self, limits: ImageLimits, preprocessing: PreprocessingConfig, decoding: DecodingConfig) -> None:
        self.limits = limits
        self.preprocessing = preprocessing
        self.decoding = decoding
        self._child: _Child | None = None
        self._lock = threading.Lock()

    def read(self, data: bytes, seconds: float | None = None) -> FittedImage:
        """Raises InvalidImage, UnsupportedFormat or ImageTooLarge, the last also when `seconds` are not enough."""
        seconds = self.decoding.seconds if seconds is None else seconds
        if seconds <= 0:
            raise ImageTooLarge("the images before this one took all the time that a request has: send fewer, or smaller ones")
        if is_simple(data) and len(data) <= INLINE_BYTES:
            with contextlib.suppress(Costly):
                return _read(data, self.limits, self.preprocessing, affordable_pixels=INLINE_PIXELS)
        elif len(data) > self.limits.max_bytes or not data:
            decode(data, self.limits)  # says what is wrong; not worth the way to the child
        with self._lock:
            if self._child is None:
                self._child = _Child(self.limits, self.preprocessing, self.decoding)
            try:
                return self._child.read(data, seconds)
            except _Lost as lost:
                self._child.end()
                self._child = None
                if lost.late:
                    raise ImageTooLarge(
                        f"the image takes more than {seconds:.1f} seconds to decode: send it smaller, or save it anew"
                    ) from None
                raise InvalidImage("the image cannot be decoded: its decoder failed on it") from None

    def start(self) -> None:
        """Start the child, so that no client waits for that."""
        with self._lock:
            if self._child is None:
                self._child = _Child(self.limits, self.preprocessing, self.decoding)

    def close(self) -> None:
        with self._lock:
            if self._child is not None:
                self._child.end()
                self._child = None


class _Lost(Exception):
    """The child has ended, or must."""

    def __init__(self, *, late: bool) -> None:
        self.late = late


class _Child:
    def __init__(self, limits: ImageLimits, preprocessing: PreprocessingConfig, decoding: DecodingConfig) -> None:
        ours, theirs = socket.socketpair()
        settings = {
            "limits": limits.model_dump(),
            "preprocessing": preprocessing.model_dump(),
            "decoding": decoding.model_dump(),
        }
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), json.dumps(settings)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | _CHILDS_ENVIRONMENT,
            )
        self.connection = Connection(ours.detach())
        self.end = weakref.finalize(self, _end, self.process, self.connection)  # at the latest when nobody uses it any more

    def read(self, data: bytes, seconds: float) -> FittedImage:
        try:
            self.connection.send_bytes(data)
            if not self.connection.poll(seconds):
                raise _Lost(late=True)
            answer = json.loads(self.connection.recv_bytes())
            if "error" in answer:
                raise _ERRORS[answer["error"]](answer["message"])
            side = answer["size"]
            pixels = np.frombuffer(self.connection.recv_bytes(side * side * 3), np.uint8).reshape(side, side, 3)
            return FittedImage(pixels.copy(), answer["width"], answer["height"], answer["format"])
        except (EOFError, OSError):
            raise _Lost(late=False) from None


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    process.kill()
    process.wait()
    connection.close()


def _read(
    data: bytes, limits: ImageLimits, preprocessing: PreprocessingConfig, *, affordable_pixels: int | None = None
) -> FittedImage:
    side = smallest_useful_side(preprocessing)
    photo = decode(data, limits, smallest_side=side, affordable_pixels=affordable_pixels)
    return FittedImage(fitted(photo.image, preprocessing), photo.width, photo.height, photo.format)


def _serve(connection: Connection, settings: dict[str, dict[str, object]]) -> None:
    """The child: one image after the other until the worker is gone."""
    limits = ImageLimits.model_validate(settings["limits"])
    preprocessing = PreprocessingConfig.model_validate(settings["preprocessing"])
    decoding = DecodingConfig.model_validate(settings["decoding"])
    memory = decoding.memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    for nothing in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(nothing, (0, 0))
    while True:
        try:
            data = connection.recv_bytes()
        except EOFError:
            return
        # The worker kills a late child; should the worker itself be gone by then, this does.
        signal.setitimer(signal.ITIMER_REAL, 2 * decoding.seconds)
        try:
            image = _read(data, limits, preprocessing)
        except RequestError as error:
            connection.send_bytes(json.dumps({"error": type(error).__name__, "message": error.message}).encode())
        else:
            about = {"width": image.width, "height": image.height, "format": image.format, "size": len(image.pixels)}
            connection.send_bytes(json.dumps(about).encode())
            connection.send_bytes(image.pixels.tobytes())
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the parent, whose end ends this
    with contextlib.suppress(BrokenPipeError):
        _serve(Connection(int(sys.argv[1])), json.loads(sys.argv[2]))
