"""The keys of a running TorchServe.

With token authorization on, TorchServe makes keys when it starts and writes them to `key_file.json` in its working
directory: one for the inference API, one for the management API, and one that renews these two.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

KEY_FILE = "CAPTION_KEY_FILE"
"""The environment variable that names the key file, for the server that links it there and for its clients."""


def bearer(api: Literal["inference", "management"], key_file: Path | None = None) -> dict[str, str]:
    """The header that `api` asks for. Empty where no key file is: there, token authorization is off."""
    path = key_file or Path(os.environ.get(KEY_FILE) or os.devnull)
    try:
        keys = json.loads(path.read_bytes() or b"{}")
    except FileNotFoundError:
        return {}
    return {"Authorization": f"Bearer {keys[api]['key']}"} if api in keys else {}
