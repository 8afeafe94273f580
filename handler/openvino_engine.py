"""OpenVINO (https://docs.openvino.ai) for the encoder on CPUs, and what `handler.openvino_search` shares with it.

Imported only where OpenVINO serves: the package is optional, and its import takes time.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import openvino

_CORE = openvino.Core()


def has_bfloat16() -> bool:
    """Are there instructions for bfloat16? Without them it is emulated, slower than float32."""
    return "BF16" in _CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVinoEncoder:
    """`handler.engine.Engine` over an IR file that `scripts.export` has written.

    Compiled for batches and, with more threads, for an image that comes alone, when the other workers have most likely
    nothing to do.
    """

    device = "cpu"

    def __init__(self, path: Path, *, name: str, precision: str, threads: int, threads_alone: int) -> None:
        """precision: `f32` or `bf16`, of whatever is not quantized in the model itself."""
        self.name = name
        self._request = self._alone = compiled(path, precision=precision, threads=threads)
        # A second copy takes as long to make as the first: not before the first image, which need not wait for it. No daemon,
        # since a process that ended in the middle of it would be aborted.
        self._making: threading.Thread | None = None
        if threads_alone > threads:
            self._making = threading.Thread(target=self._make_alone, args=(path, precision, threads_alone))

    def encode(self, images: np.ndarray) -> np.ndarray:
        alone = len(images) == 1
        if alone and self._making is not None and self._making.ident is None:
            self._making.start()
        request = self._alone if alone else self._request
        return np.array(request.infer([images], share_inputs=True, share_outputs=True)[0])

    def _make_alone(self, path: Path, precision: str, threads: int) -> None:
        model = _CORE.read_model(path)
        model.reshape([1, *list(model.input().partial_shape)[1:]])  # what is fixed saves OpenVINO some work
        self._alone = compiled(model, precision=precision, threads=threads)


def compiled(model: Path | openvino.Model, *, precision: str, threads: int) -> openvino.InferRequest:
    """A model, ready for one call at a time. With `share_outputs` what it returns is its own memory, until the next call."""
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # each worker would pin itself to the same first CPUs
    }
    return _CORE.compile_model(model, "CPU", config).create_infer_request()
