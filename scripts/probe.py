"""Is the service ready, or at least alive? `python -m scripts.probe` exits with 0 if it is, and says why if it is not.

TorchServe's own `/ping` says Healthy while models still load, while their workers crash again and again, and after it has
given up on them. Here there are three questions:

  (neither)    has every worker loaded the model? For whoever waits for a start.
  --readiness  is there a worker that answers? For a load balancer: one worker of four that restarts is no reason to leave.
  --liveness   does a request get an answer at all? A no, several times in a row, is a reason to start the service anew.

With --canary, the first two caption an image as well; the third always does.
"""

from __future__ import annotations

import argparse
import base64
import re
import sys
import time
from pathlib import Path
from typing import Any

import requests

from scripts.authorization import bearer

POLL_SECONDS = 0.25
CANARY = base64.b64decode(
    b"iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAAAAABWESUoAAAAGElEQVR42mNsYMAPmBhGFYwqGFUwQhUAAJe+AMD8WknZAAAAAElFTkSuQmCC"
)
"""A grey image."""
CANARY_ID = "canary"
"""Its name in the access log."""


def not_ready(
    management: str, model: str, *, any_worker: bool = False, timeout: float = 5.0, key_file: Path | None = None
) -> str | None:
    """Why `model` is not ready to answer, or None when it is.

    Every worker of every version must be READY, or with `any_worker` at least one of the version that requests go to.
    """
    try:
        versions = _versions(management, model, timeout=timeout, key_file=key_file)
    except requests.RequestException as error:
        return f"the management API does not answer ({type(error).__name__})"
    if isinstance(versions, int):
        return f"model {model} is not registered (status {versions})"
    states = [worker["status"] for version in versions for worker in version["workers"]]
    if not states:
        return f"model {model} has no workers"
    if "READY" not in states or (set(states) != {"READY"} and not any_worker):
        return f"model {model} has workers in the states {', '.join(states)}"
    return None


def switched_off(management: str, model: str, *, timeout: float = 5.0, key_file: Path | None = None) -> bool:
    """Has somebody unregistered the model, or set its workers to none? Then silence is no fault."""
    try:
        versions = _versions(management, model, timeout=timeout, key_file=key_file)
    except requests.RequestException:
        return False
    if isinstance(versions, int):
        return versions == 404
    return all(version["minWorkers"] == 0 and not version["workers"] for version in versions)


def _versions(management: str, model: str, *, timeout: float, key_file: Path | None) -> list[dict[str, Any]] | int:
    """What TorchServe knows of the model's default version, or the status with which it refused to say so."""
    response = requests.get(f"{management}/models/{model}", headers=bearer("management", key_file), timeout=timeout)
    return response.json() if response.status_code == 200 else response.status_code


def no_answer(inference: str, model: str, *, timeout: float = 10.0, key_file: Path | None = None) -> tuple[int, str | None]:
    """The status with which the canary is answered (0 for no answer), and what is wrong with that, if anything."""
    try:
        response = requests.post(
            f"{inference}/predictions/{model}",
            data=CANARY,
            headers={"Content-Type": "image/png", "X-Request-Id": CANARY_ID, **bearer("inference", key_file)},
            timeout=timeout,
        )
    except requests.Timeout:
        return 0, f"the inference API has not answered for {timeout:.0f} seconds"
    except requests.RequestException as error:
        return 0, f"the inference API does not answer ({type(error).__name__})"
    status = response.status_code
    return status, None if status == 200 else f"a canary image is answered with status {status}"


def no_caption(inference: str, model: str, *, timeout: float = 10.0, key_file: Path | None = None) -> str | None:
    """Why the canary gets no caption, or None when it gets one."""
    return no_answer(inference, model, timeout=timeout, key_file=key_file)[1]


def work_done(metrics: str, *, timeout: float = 5.0) -> float | None:
    """How many images the workers have answered, with captions or an error. None where that is not told."""
    try:
        text = requests.get(f"{metrics}/metrics", timeout=timeout).text
    except requests.RequestException:
        return None
    counts = [float(count) for count in re.findall(r"^Caption(?:edImages|Errors)\{.*\} (\S+)", text, re.MULTILINE)]
    return sum(counts) if counts else None


def not_alive(management: str, inference: str, model: str, *, timeout: float = 10.0) -> str | None:
    """Why the service should be started anew, or None.

    Too many requests at once (503) and a request that is refused are signs of life, and so is a model that is switched off.
    """
    status, reason = no_answer(inference, model, timeout=timeout)
    if reason is None or 400 <= status < 500 or status == 503 or switched_off(management, model):
        return None
    return reason


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="caption")
    parser.add_argument("--management", default="http://127.0.0.1:8081")
    parser.add_argument("--inference", default="http://127.0.0.1:8080")
    question = parser.add_mutually_exclusive_group()
    question.add_argument("--readiness", action="store_true", help="one worker that answers is enough")
    question.add_argument("--liveness", action="store_true", help="any sign of life is enough")
    parser.add_argument("--canary", action="store_true", help="caption an image as well")
    parser.add_argument("--timeout", type=float, default=10, help="seconds to wait for each answer (default: 10)")
    parser.add_argument("--wait", type=float, default=0, help="seconds to try again (default: 0)")
    arguments = parser.parse_args()
    model, management, inference, timeout = arguments.model, arguments.management, arguments.inference, arguments.timeout
    deadline = time.monotonic() + arguments.wait
    while True:
        if arguments.liveness:
            reason = not_alive(management, inference, model, timeout=timeout)
        else:
            reason = not_ready(management, model, any_worker=arguments.readiness, timeout=timeout)
            if reason is None and arguments.canary:
                reason = no_caption(inference, model, timeout=timeout)
        if reason is None or time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    if reason is not None:
        sys.exit(f"{'not alive' if arguments.liveness else 'not ready'}: {reason}")


if __name__ == "__main__":
    main()
