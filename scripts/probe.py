"""Is the service really ready? `python -m scripts.probe` exits with 0 if it is.

TorchServe's `/ping` says Healthy while models still load and while their workers crash again and again. Here a model is
ready when every worker of it is READY, and, with `--canary`, when it captions an image.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from pathlib import Path

import requests
from PIL import Image

from scripts.authorization import bearer

POLL_SECONDS = 0.25


def not_ready(management: str, model: str, *, timeout: float = 5.0, key_file: Path | None = None) -> str | None:
    """Why `model` is not ready to answer, or None when it is. Any version counts that has workers."""
    try:
        response = requests.get(f"{management}/models/{model}", headers=bearer("management", key_file), timeout=timeout)
    except requests.RequestException as error:
        return f"the management API does not answer ({type(error).__name__})"
    if response.status_code != 200:
        return f"model {model} is not registered (status {response.status_code})"
    states = [worker["status"] for version in response.json() for worker in version["workers"]]
    if not states:
        return f"model {model} has no workers"
    if set(states) != {"READY"}:
        return f"model {model} has workers in the states {', '.join(states)}"
    return None


def no_caption(inference: str, model: str, *, timeout: float = 10.0) -> str | None:
    """Why a small grey image gets no answer, or None when it gets one."""
    image = io.BytesIO()
    Image.new("RGB", (32, 32), "grey").save(image, "PNG")
    try:
        response = requests.post(
            f"{inference}/predictions/{model}", data=image.getvalue(), headers=bearer("inference"), timeout=timeout
        )
    except requests.RequestException as error:
        return f"the inference API does not answer ({type(error).__name__})"
    return None if response.status_code == 200 else f"a canary image is answered with status {response.status_code}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="caption")
    parser.add_argument("--management", default="http://127.0.0.1:8081")
    parser.add_argument("--inference", default="http://127.0.0.1:8080")
    parser.add_argument("--canary", action="store_true", help="caption an image as well")
    parser.add_argument("--wait", type=float, default=0, help="seconds to wait for it")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.wait
    while True:
        reason = not_ready(arguments.management, arguments.model)
        if reason is None and arguments.canary:
            reason = no_caption(arguments.inference, arguments.model)
        if reason is None or time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    if reason is not None:
        sys.exit(f"not ready: {reason}")


if __name__ == "__main__":
    main()
