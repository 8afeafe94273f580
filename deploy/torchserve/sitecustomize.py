"""Lets a worker do without torch where OpenVINO serves. Packed into the .mar, whose folder is on a worker's path.

Python imports this file when it starts. TorchServe's worker imports torch for one `isinstance` that our answers never come
to; it takes a second of a cold start and 140 MiB of every worker. What is imported here instead becomes torch as soon as
anybody uses it.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any


class _Torch(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if sys.modules.get("torch") is self:
            del sys.modules["torch"]
        return getattr(importlib.import_module("torch"), name)


if "torch" not in sys.modules and (_spec := importlib.util.find_spec("torch")) is not None:
    sys.modules["torch"] = _Torch("torch")
    sys.modules["torch"].__spec__ = _spec  # for who asks whether there is torch
