"""The one tree of errors: each class carries the HTTP status and the machine-readable code of its answer.

The statuses and codes of `RequestError`'s subclasses are the service's published error table (docs/api.md).
Everything outside `RequestError` is a fault of the installation or of a file on the server, never of a client.
"""

from __future__ import annotations

from typing import ClassVar


class CaptionError(Exception):
    """Root of every error this package raises on purpose. `str(error)` says what is wrong and what to do."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "InternalError"

    @property
    def message(self) -> str:
        return str(self)

    def as_json(self) -> dict[str, dict[str, str]]:
        """The body of the error answer: `{"error": {"code": …, "message": …}}`."""
        return {"error": {"code": self.code, "message": self.message}}


class RequestError(CaptionError):
    """Something is wrong with what a client sent."""

    status = 400
    code = "InvalidRequest"


class MissingImage(RequestError):
    code = "MissingImage"


class InvalidImage(RequestError):
    code = "InvalidImage"


class InvalidParameter(RequestError):
    code = "InvalidParameter"


class InvalidRequest(RequestError):
    """Broken JSON or base64, a body of the wrong shape, too many instances."""


class ImageTooLarge(RequestError):
    status = 413
    code = "ImageTooLarge"


class UnsupportedFormat(RequestError):
    status = 415
    code = "UnsupportedFormat"


class CheckpointError(CaptionError):
    """A checkpoint is missing, damaged, of a foreign format, or does not fit its own configuration."""

    code = "InvalidCheckpoint"
