"""The whole beam search as one graph of OpenVINO: no Python between two steps, nor for any token.

It does what `handler.beam_search.search` does with the folded decoder (`handler.expansion`), and the tests hold it to that.
The graph is a loop. What a step keeps of B images lies in a grid (B, W), where W is the widest beam that can be asked for, and
so do the best captions found. The R captions that are live are packed before the next step, so what has ended or has no hope
costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import openvino
from openvino import Node
from openvino import opset13 as op

from handler.beam_search import Found, Hypothesis, Search, Step, trace
from handler.expansion import Folded
from handler.openvino_engine import compiled
from handler.parameters import MAX_BEAM_SIZE

_WIDTH = MAX_BEAM_SIZE
_BOUNDLESS = 1e30
"""Greater than any number here, and in float32 finite even when a log-likelihood is multiplied by it."""

Value = TypeVar("Value")
"""A node of the graph, or one of its outputs."""


class OpenVinoSearch:
    """`handler.beam_search.Searcher` of a folded decoder."""

    def __init__(self, folded: Folded[np.ndarray], end_token: int, *, precision: str, threads: int) -> None:
        """precision: what the products multiply: `f32`, `bf16`, or `int8` in those of the steps and f32 in what is made of the
        image, which would lose more by it. Sums and all else are float32.
        """
        int8 = precision == "int8"
        graph = _search_graph(folded, end_token, int8)
        self._request = compiled(graph, precision="f32" if int8 else precision, threads=threads)

    def __call__(self, features: np.ndarray, searches: Sequence[Search]) -> list[list[Hypothesis]]:
        images = len(searches)
        if images == 0:
            return []
        integers = np.array([(one.start_token, one.beam_size, one.max_length) for one in searches], np.int32)
        reals = np.array([(one.length_penalty, _hope(one)) for one in searches], np.float32)
        outputs = self._request.infer([features, integers, reals], share_inputs=True, share_outputs=True)
        scores, ends, *history = [outputs[number].tolist() for number in range(5)]
        steps = [[Step(*grids) for grids in zip(*step, strict=True)] for step in zip(*history, strict=True)]  # (T, B)
        return [
            [
                trace([step[image] for step in steps], Found(score, *divmod(end, _WIDTH)))
                for score, end in zip(scores[image][: searches[image].beam_size], ends[image], strict=False)
                if score > -np.inf
            ]
            for image in range(images)
        ]


def _hope(wanted: Search) -> float:
    """What the log-likelihood of a live caption is multiplied by for the best score that it can come to."""
    if wanted.length_penalty == 0:
        return _BOUNDLESS  # none that is enough, as soon as enough are found
    return 1 / wanted.normalizer(wanted.max_length)


class _State(NamedTuple, Generic[Value]):
    """What a step takes from the one before."""

    recurrent: Value
    """(R', 4H), of the captions that were live before; see `FoldedState`"""
    cell: Value
    """(R', H)"""
    row: Value
    """(R,) where in those each live caption's memory is"""
    token: Value
    """(R,) that it is extended by"""
    place: Value
    """(R,) in the grid, flat"""
    total: Value
    """(R,) log-likelihood"""
    scores: Value
    """(B, W) of found captions, best first, -inf where there is none"""
    ends: Value
    """(B, W) where they end: length x W + place in the image's grid"""
    length: Value
    """() steps made"""


class _Wanted(NamedTuple, Generic[Value]):
    """What is searched for each image."""

    outside: Value
    """(B, W) -inf beyond the beam size, else 0"""
    last: Value
    """(B, 1) beam size - 1"""
    max_length: Value
    """(B, 1)"""
    penalty: Value
    """(B, 1) length penalty"""
    hope: Value
    """(B, 1) `_hope`"""


def _search_graph(folded: Folded[np.ndarray], end_token: int, int8: bool) -> openvino.Model:
    """What is searched to what is found.

    In: features (B, 2048); start token, beam size and maximal length (B, 3); length penalty and `_hope` (B, 2).
    Out: scores and ends (B, W) and, of T steps, parents, tokens and gains (T, B, W).
    """
    features = op.parameter([-1, folded.embed_image.shape[1]], np.float32)
    integers, reals = op.parameter([-1, 3], np.int32), op.parameter([-1, 2], np.float32)
    start_token, beam_size, max_length = op.split(integers, 1, 3).outputs()
    penalty, hope = op.split(reals, 1, 2).outputs()
    wanted = _Wanted(
        outside=op.select(op.less(_integers(range(_WIDTH)), beam_size), _numbers(0), _numbers(-np.inf)).output(0),
        last=op.subtract(beam_size, _integers(1)).output(0),
        max_length=max_length,
        penalty=penalty,
        hope=hope,
    )
    first = _first_state(folded, features, _flat(start_token), int8)
    state, invariant = _parameters(folded)
    more, following, history = _step(folded, end_token, state, invariant, int8)
    results = [op.result(node) for node in (more, *following, *history)]

    loop = op.loop(_integers(-1), _constant(np.array([True])))  # as many steps as it takes
    loop.set_function(openvino.Model(results, [*state, *invariant]))
    loop.set_special_body_ports([-1, 0])
    next_state = _State(*results[1 : 1 + len(following)])
    for parameter, value, result in zip(state, first, next_state, strict=True):
        loop.set_merged_input(parameter, value.output(0), result.output(0))
    for parameter, output in zip(invariant, wanted, strict=True):
        loop.set_invariant_input(parameter, output)
    found = [loop.get_iter_value(result.output(0), -1) for result in (next_state.scores, next_state.ends)]
    steps = [loop.get_concatenated_slices(r.output(0), 0, 1, 1, -1, 0) for r in results[1 + len(following) :]]
    return openvino.Model([op.result(output) for output in (*found, *steps)], [features, integers, reals])


def _first_state(folded: Folded[np.ndarray], features: Node, start_token: Node, int8: bool) -> _State[Node]:
    """What the decoder remembers of each image, and one caption of each, at its first place, with nothing but a start token."""
    gate_size = folded.table.shape[1]
    image = _affine(features, folded.embed_image, folded.image_bias)
    hidden, cell = _lstm(_affine(image, folded.input, folded.input_bias), None)
    row, images = _arange_like(start_token), op.shape_of(start_token, "i32")
    grid = op.concat([images, _integers([_WIDTH])], 0)
    return _State(
        recurrent=_affine(hidden, folded.product[:gate_size], folded.product_bias[:gate_size], int8),
        cell=cell,
        row=row,
        token=start_token,
        place=op.multiply(row, _integers(_WIDTH)),
        total=op.broadcast(_numbers(0), images),
        scores=op.broadcast(_numbers(-np.inf), grid),
        ends=op.broadcast(_integers(0), grid),
        length=_integers(0),
    )


def _parameters(folded: Folded[np.ndarray]) -> tuple[_State[Node], _Wanted[Node]]:
    gate_size = folded.table.shape[1]
    state = _State(
        recurrent=op.parameter([-1, gate_size], np.float32),
        cell=op.parameter([-1, gate_size // 4], np.float32),
        row=op.parameter([-1], np.int32),
        token=op.parameter([-1], np.int32),
        place=op.parameter([-1], np.int32),
        total=op.parameter([-1], np.float32),
        scores=op.parameter([-1, _WIDTH], np.float32),
        ends=op.parameter([-1, _WIDTH], np.int32),
        length=op.parameter([], np.int32),
    )
    wanted = _Wanted(
        outside=op.parameter([-1, _WIDTH], np.float32),
        last=op.parameter([-1, 1], np.int32),
        max_length=op.parameter([-1, 1], np.int32),
        penalty=op.parameter([-1, 1], np.float32),
        hope=op.parameter([-1, 1], np.float32),
    )
    return state, wanted


def _step(
    folded: Folded[np.ndarray], end_token: int, state: _State[Node], wanted: _Wanted[Node], int8: bool
) -> tuple[Node, _State[Node], tuple[Node, Node, Node]]:
    """Extend every live caption and keep the best of each image.

    Returns whether there are live ones, the state for the next step, and, with a leading axis of 1, the parents, tokens and
    gains (B, W) of what was kept.
    """
    words = len(folded.mask)
    ranks = min(_WIDTH, words)
    recurrent, cell, logits = _decode(folded, state, int8)
    # Not ReduceLogSumExp, which does not subtract the greatest first and overflows.
    greatest = op.reduce_max(logits, np.array([1]), True)
    sum_of_all = op.reduce_sum(op.exp(op.subtract(logits, greatest)), np.array([1]), True)
    best = op.topk(op.add(logits, _constant(folded.mask[None])), ranks, 1, "max", "value")
    gains = op.subtract(best.output(0), op.add(op.log(sum_of_all), greatest))  # (R, ranks)

    # Each caption's extensions at its place, and the best W of each image's W x ranks
    places = op.shape_of(op.reshape(wanted.outside, _integers([-1]), False), "i32")
    grid = op.broadcast(_numbers(-np.inf), op.concat([places, _integers([ranks])], 0))
    grid = op.scatter_update(grid, state.place, op.add(op.unsqueeze(state.total, _integers(1)), gains), _integers(0))
    top = op.topk(op.reshape(grid, _integers([-1, _WIDTH * ranks]), False), _WIDTH, 1, "max", "value")
    total = op.add(top.output(0), wanted.outside)  # (B, W)
    parent = op.divide(top.output(1), _integers(ranks))

    # What they came from: the row that stands at a place
    row_at = op.scatter_update(op.broadcast(_integers(0), places), state.place, _arange_like(state.place), _integers(0))
    row = op.gather_elements(op.reshape(row_at, _integers([-1, _WIDTH]), False), parent, 1)
    extension = op.add(op.multiply(op.subtract(row, parent), _integers(ranks)), top.output(1))  # row x ranks + rank
    token = op.gather(_flat(best.output(1)), extension, _integers(0))
    gain = op.gather(_flat(gains), extension, _integers(0))

    # What is not kept is -inf in `total`, and so neither found nor live.
    length = op.add(state.length, _integers(1))
    ended = op.logical_or(op.equal(token, _integers(end_token)), op.equal(wanted.max_length, length))
    scores, ends = _collect(state, wanted, length, total, ended)
    worst = op.gather_elements(scores, wanted.last, 1)
    live = op.logical_and(op.greater(op.multiply(total, wanted.hope), worst), op.logical_not(ended))
    place = _flat(op.non_zero(_flat(live), "i32"))
    row, next_token, next_total = (op.gather(_flat(values), place, _integers(0)) for values in (row, token, total))
    more = op.reduce_logical_or(_flat(live), _integers([0]), True)
    following = _State(recurrent, cell, row, next_token, place, next_total, scores, ends, length)
    return more, following, tuple(op.unsqueeze(values, _integers(0)) for values in (parent, token, gain))


def _decode(folded: Folded[np.ndarray], state: _State[Node], int8: bool) -> tuple[Node, Node, Node]:
    """One token more for each live caption: recurrent part (R, 4H), cell (R, H) and logits (R, V)."""
    words, gate_size = folded.table.shape
    gates = op.gather(state.recurrent, state.row, _integers(0))
    gates = op.add(gates, op.gather(_constant(folded.table), state.token, _integers(0)))
    hidden, cell = _lstm(gates, op.gather(state.cell, state.row, _integers(0)))
    product = _affine(hidden, folded.product, folded.product_bias, int8)
    recurrent, logits = op.variadic_split(product, 1, np.array([gate_size, words])).outputs()
    return recurrent, cell, logits


def _collect(state: _State[Node], wanted: _Wanted[Node], length: Node, total: Node, ended: Node) -> tuple[Node, Node]:
    """Scores and ends (B, W) with those that ended in this step."""
    normalizer = op.power(op.divide(op.convert(op.add(length, _integers(5)), np.float32), _numbers(6)), wanted.penalty)
    scores = op.select(ended, op.divide(total, normalizer), _numbers(-np.inf))
    places = op.add(op.multiply(length, _integers(_WIDTH)), _integers(range(_WIDTH)))  # (W,)
    ends = op.broadcast(places, op.shape_of(total, "i32"))
    best = op.topk(op.concat([state.scores, scores], 1), _WIDTH, 1, "max", "value")
    return best.output(0), op.gather_elements(op.concat([state.ends, ends], 1), best.output(1), 1)


def _lstm(gates: Node, cell: Node | None) -> tuple[Node, Node]:
    enter, forget, new, leave = op.split(gates, 1, 4).outputs()
    added = op.multiply(op.sigmoid(enter), op.tanh(new))
    cell = added if cell is None else op.add(op.multiply(op.sigmoid(forget), cell), added)
    return op.multiply(op.sigmoid(leave), op.tanh(cell)), cell


def _affine(inputs: Node, weight: np.ndarray, bias: np.ndarray, int8: bool = False) -> Node:
    """int8: multiply in int8, the inputs, which lie between -1 and 1, in steps of 1/127, and the weights in as many by row."""
    if int8:
        inputs = op.fake_quantize(inputs, *[_numbers(limit) for limit in (-1, 1, -1, 1)], 255)
        step = np.maximum(np.abs(weight).max(1, keepdims=True) / 127, np.finfo(np.float32).tiny)
        quantized = _constant(np.round(weight / step).astype(np.int8))
        weights = op.multiply(op.convert(quantized, np.float32), _constant(step))
    else:
        weights = _constant(weight)
    # OpenVINO would round a product of bf16 to bf16, the logits too. A clamp that clamps nothing becomes part of the product
    # and, as what follows it, has it written in float32.
    return op.clamp(op.add(op.matmul(inputs, weights, False, True), _constant(bias[None])), -_BOUNDLESS, _BOUNDLESS)


def _flat(values: Node) -> Node:
    return op.reshape(values, _integers([-1]), False)


def _arange_like(values: Node) -> Node:
    """0, 1, … for each of (R,)."""
    count = op.squeeze(op.shape_of(values, "i32"), _integers([0]))
    return op.range(_integers(0), count, _integers(1), "i32")


def _constant(values: np.ndarray) -> Node:
    return op.constant(np.ascontiguousarray(values))


def _integers(values: int | Sequence[int]) -> Node:
    return op.constant(np.array(values, np.int32))


def _numbers(value: float) -> Node:
    return op.constant(np.array(value, np.float32))
