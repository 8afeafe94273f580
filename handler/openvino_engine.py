"""OpenVINO (https://docs.openvino.ai) for the encoder and for the step of the search, on CPUs.

Imported only where OpenVINO serves: the package is optional, and its import takes time.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as op

from handler.expansion import Folded, FoldedState
from handler.parameters import MAX_BEAM_SIZE

_CORE = openvino.Core()


def has_bfloat16() -> bool:
    """Are there instructions for bfloat16? Without them it is emulated, slower than float32."""
    return "BF16" in _CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVinoEncoder:
    """`handler.engine.Engine` over an IR file that `scripts.export` has written."""

    def __init__(self, path: Path, *, name: str, precision: str, threads: int, threads_alone: int) -> None:
        """precision: `f32` or `bf16`, of whatever is not quantized in the file itself.

        threads_alone: for an image that comes alone, when the other workers have most likely nothing to do.
        """
        self.name = name
        self.device = "cpu"
        self._request = self._alone = _compiled(path, precision, threads).create_infer_request()
        # A second copy takes as long to make as the first: not before the first image, which need not wait for it. No daemon,
        # since a process that ended in the middle of it would be aborted.
        self._making = threading.Thread(target=self._make_alone, args=(path, precision, threads_alone))
        self._made = threads_alone <= threads

    def _make_alone(self, path: Path, precision: str, threads: int) -> None:
        self._alone = _compiled(path, precision, threads).create_infer_request()

    def encode(self, images: np.ndarray) -> np.ndarray:
        if len(images) == 1 and not self._made:
            self._made = True
            self._making.start()
        request = self._alone if len(images) == 1 else self._request
        # Shared both ways; the features are copied, since the request writes the next ones to the same place.
        outputs = request.infer([images], share_inputs=True, share_outputs=True)
        return np.array(outputs[0])


class OpenVinoExpander:
    """The folded decoder as two graphs: one product a step for all captions, and one call from Python."""

    def __init__(self, folded: Folded[np.ndarray], *, precision: str, threads: int) -> None:
        """precision: `f32` or `bf16`, of what the product multiplies. Its sums and all else are float32."""
        self._start = _compiled(_start_graph(folded), "f32", threads).create_infer_request()
        step = _compiled(_step_graph(folded), precision, threads)
        # Each reads the state that the other has written, in place.
        self._requests = [step.create_infer_request(), step.create_infer_request()]

    def start(self, features: np.ndarray) -> FoldedState[np.ndarray]:
        outputs = self._start.infer([features], share_inputs=True, share_outputs=True)
        return FoldedState(outputs[0], outputs[1])

    def expand(
        self, state: FoldedState[np.ndarray], rows: np.ndarray, tokens: np.ndarray, width: int
    ) -> tuple[np.ndarray, np.ndarray, FoldedState[np.ndarray]]:
        request = self._requests[0]
        self._requests.reverse()
        inputs = [state.recurrent, state.cell, rows.astype(np.int32), tokens.astype(np.int32)]
        outputs = request.infer(inputs, share_inputs=True, share_outputs=True)
        gains, words = outputs[2][:, :width].copy(), outputs[3][:, :width].copy()
        return gains, words, FoldedState(outputs[0], outputs[1])


def _compiled(model: Path | openvino.Model, precision: str, threads: int) -> Any:
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # each worker would pin itself to the same first CPUs
    }
    return _CORE.compile_model(model, "CPU", config)


def _start_graph(folded: Folded[np.ndarray]) -> openvino.Model:
    """Features (B, 2048) to the recurrent part of the next gates (B, 4H) and the cell (B, H)."""
    hidden_size = folded.product.shape[1]
    features = op.parameter([-1, folded.embed_image.shape[1]], np.float32)
    image = _affine(features, folded.embed_image, folded.image_bias)
    gates = _affine(image, folded.input, folded.input_bias)
    hidden, cell = _lstm(gates, None)
    recurrent = op.matmul(hidden, _constant(folded.product[: 4 * hidden_size]), False, True)
    return openvino.Model([op.result(recurrent), op.result(cell)], [features])


def _step_graph(folded: Folded[np.ndarray]) -> openvino.Model:
    """Old recurrent part (R', 4H) and cell (R', H), rows (R,) and tokens (R,) to the new ones, gains and words (R, W)."""
    words, gate_size = folded.table.shape
    recurrent, cell = op.parameter([-1, gate_size], np.float32), op.parameter([-1, gate_size // 4], np.float32)
    rows, tokens = op.parameter([-1], np.int32), op.parameter([-1], np.int32)
    gates = op.add(op.gather(recurrent, rows, 0), op.gather(_constant(folded.table), tokens, 0))
    hidden, new_cell = _lstm(gates, op.gather(cell, rows, 0))
    # OpenVINO would round a product of bf16 to bf16, the logits too. A clamp that clamps nothing becomes part of the product
    # and, as what follows the last product, has it written in float32.
    product = op.clamp(_affine(hidden, folded.product, folded.product_bias), -1e30, 1e30)
    new_recurrent, logits = op.variadic_split(product, 1, np.array([gate_size, words])).outputs()
    # Not ReduceLogSumExp, which does not subtract the greatest first and overflows.
    greatest = op.reduce_max(logits, np.array([1]), True)
    total = op.reduce_sum(op.exp(op.subtract(logits, greatest)), np.array([1]), True)
    best = op.topk(op.add(logits, _constant(folded.mask[None])), min(MAX_BEAM_SIZE, words), 1, "max", "value")
    gains = op.subtract(best.output(0), op.add(op.log(total), greatest))
    results = [new_recurrent, new_cell, gains, best.output(1)]
    return openvino.Model([op.result(result) for result in results], [recurrent, cell, rows, tokens])


def _lstm(gates: openvino.Node, cell: openvino.Node | None) -> tuple[openvino.Node, openvino.Node]:
    enter, forget, new, leave = op.split(gates, 1, 4).outputs()
    added = op.multiply(op.sigmoid(enter), op.tanh(new))
    cell = added if cell is None else op.add(op.multiply(op.sigmoid(forget), cell), added)
    return op.multiply(op.sigmoid(leave), op.tanh(cell)), cell


def _affine(inputs: openvino.Node, weight: np.ndarray, bias: np.ndarray) -> openvino.Node:
    return op.add(op.matmul(inputs, _constant(weight), False, True), _constant(bias[None]))


def _constant(values: np.ndarray) -> openvino.Node:
    return op.constant(np.ascontiguousarray(values))
