"""OpenVINO (https://docs.openvino.ai) for the encoder on CPUs, and what `handler.openvino_search` shares with it.

Imported only where OpenVINO serves: the package is optional, and its import takes time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino

_CORE = openvino.Core()


def has_bfloat16() -> bool:
    """Are there instructions for bfloat16? Without them it is emulated, slower than float32."""
    return "BF16" in _CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class Compiled:
    """A model, compiled for batches and, with more threads, for an image that comes alone."""

    def __init__(
        self,
        model: Path | openvino.Model,
        *,
        precision: str,
        threads: int,
        threads_alone: int = 0,
        of_images: Sequence[int] = (),
    ) -> None:
        """precision: `f32` or `bf16`, of whatever is not quantized in the model itself.

        threads_alone: for an image that comes alone, when the other workers have most likely nothing to do.
        of_images: the inputs whose first axis counts the images. It is fixed for the one, which saves OpenVINO some work.
        """
        self._request = self._alone = _compiled(model, precision, threads)
        # A second copy takes as long to make as the first: not before the first image, which need not wait for it. No daemon,
        # since a process that ended in the middle of it would be aborted.
        self._making: threading.Thread | None = None
        if threads_alone > threads:
            self._making = threading.Thread(target=self._make_alone, args=(model, precision, threads_alone, of_images))

    def _make_alone(self, model: Path | openvino.Model, precision: str, threads: int, of_images: Sequence[int]) -> None:
        if isinstance(model, Path):
            model = _CORE.read_model(model)
        model.reshape({number: [1, *list(model.input(number).partial_shape)[1:]] for number in of_images})
        self._alone = _compiled(model, precision, threads)

    def infer(self, inputs: Sequence[np.ndarray], *, alone: bool = False) -> Any:
        """The outputs by their number. They are the model's own memory: the next call writes to the same place."""
        if alone and self._making is not None and self._making.ident is None:
            self._making.start()
        request = self._alone if alone else self._request
        return request.infer(inputs, share_inputs=True, share_outputs=True)


class OpenVinoEncoder:
    """`handler.engine.Engine` over an IR file that `scripts.export` has written."""

    device = "cpu"

    def __init__(self, path: Path, *, name: str, precision: str, threads: int, threads_alone: int) -> None:
        self.name = name
        self._model = Compiled(path, precision=precision, threads=threads, threads_alone=threads_alone, of_images=[0])

    def encode(self, images: np.ndarray) -> np.ndarray:
        return np.array(self._model.infer([images], alone=len(images) == 1)[0])


def _compiled(model: Path | openvino.Model, precision: str, threads: int) -> openvino.InferRequest:
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # each worker would pin itself to the same first CPUs
    }
    return _CORE.compile_model(model, "CPU", config).create_infer_request()
