"""The access log: one line of JSON for each request that reached a worker, never with anything of its content.

A thread of its own writes it, so that no answer waits for a slow disk or terminal. What TorchServe refuses itself (unknown
paths, a full queue) does not come here; its counters `Requests4XX` and `Requests5XX` have it.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from handler.contract import CaptionRequest, Result
from handler.errors import CaptionError

logger = logging.getLogger(__name__)

_CLIENT_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class AccessLog:
    """Takes entries at once and writes them in the background. Those that pile up beyond `capacity` are dropped."""

    def __init__(self, capacity: int = 1000) -> None:
        self._entries: queue.Queue[dict[str, Any]] = queue.Queue(capacity)
        self._dropped = 0
        threading.Thread(target=self._write, name="access-log", daemon=True).start()

    def add(self, entry: dict[str, Any]) -> None:
        try:
            self._entries.put_nowait(entry)
        except queue.Full:
            self._dropped += 1

    def flush(self) -> None:
        """Wait until everything is written."""
        self._entries.join()

    def _write(self) -> None:
        while True:
            entry = self._entries.get()
            dropped, self._dropped = self._dropped, 0
            if dropped:
                entry["dropped_before"] = dropped
            logger.info(json.dumps(entry, separators=(",", ":")))  # ASCII and one line, whatever an entry holds
            self._entries.task_done()


def client_id(headers: dict[str, str]) -> str | None:
    """The client's own id of its request, if it is one that can stand in a header and in a log as it is.

    The frontend (HttpRequestHandler.java) gives it back in the answer. headers: names in lower case.
    """
    given = headers.get("x-request-id", "")
    return given if _CLIENT_ID.fullmatch(given) else None


def entry(
    request: CaptionRequest | CaptionError, results: Sequence[Result], *, status: int, **more: str | float | None
) -> dict[str, Any]:
    """What is logged of one request, given a result for each of its images; `more` are fields as they are."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line: dict[str, Any] = {"time": now, "status": status} | {k: v for k, v in more.items() if v is not None}
    if isinstance(request, CaptionError):
        return line | {"code": request.code}
    line |= {"form": request.form, "bytes": sum(len(image) for image in request.images if isinstance(image, bytes))}
    failed = [result for result in results if isinstance(result, CaptionError)]
    if failed:
        line["code"] = failed[0].code
    captioned = [result for result in results if not isinstance(result, CaptionError)]
    if captioned:
        line["language"] = captioned[0].language
        line["encode_ms"], line["search_ms"] = round(captioned[0].encode_ms, 2), round(captioned[0].search_ms, 2)
    line["images"] = [
        {"code": result.code}
        if isinstance(result, CaptionError)
        else {
            "width": result.image.width,
            "height": result.image.height,
            "format": result.image.format,
            "captions": len(result.captions),
            "decode_ms": round(result.image.decode_ms, 2),
        }
        for result in results
    ]
    return line
