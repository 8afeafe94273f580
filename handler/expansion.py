"""One step of the search: every live caption, extended by one token. The decoder as the beam search drives it.

`handler.torch_expansion.PlainExpander` asks the decoder as it was trained and is what the others are tested against. They do
the same arithmetic with less of it and in fewer calls, with weights that are folded here. The product of the hidden state h
with the output weights gives the logits of this step, its product with the recurrent weights is needed in the next one, so
one product with both does. What a token contributes to the next step's gates, W_ih embedding + b, depends on the token
alone: a table, filled once.

No torch here: where OpenVINO serves, a worker never loads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

State = TypeVar("State")
Array = TypeVar("Array")
"""Of numpy or torch, as the expander has it."""


class Expander(Protocol[State]):
    """The arrays are of numpy, since what the search does with them is small."""

    def start(self, features: np.ndarray) -> State:
        """Features (B, 2048), float32, to the state of B captions before their start token."""
        ...

    def expand(self, state: State, rows: np.ndarray, tokens: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, State]:
        """Give each caption its token, and find the likeliest next ones.

        rows: (R,) where in `state` each caption's memory is; tokens: (R,) the token it is extended by.

        Returns the log-likelihoods of the `width` likeliest next tokens (R, W), best first, -inf for those that must not
        be generated, the tokens themselves (R, W), and the new state, in the order of `rows`. W is `width`, or the size
        of the vocabulary where that is less. The state must be used, if at all, for the next call.
        """
        ...


class Folded(NamedTuple, Generic[Array]):
    """A decoder's weights for search alone, float32; H is its hidden size, E its embedding size, V its vocabulary."""

    embed_image: Array
    """(E, 2048)"""
    image_bias: Array
    """(E,)"""
    input: Array
    """(4H, E), for the image alone"""
    input_bias: Array
    """(4H,)"""
    table: Array
    """(V, 4H): what each token adds to the gates, biases included"""
    product: Array
    """(4H + V, H): the recurrent weights above the output weights"""
    product_bias: Array
    """(4H + V,): zeros above the output's bias"""
    mask: Array
    """(V,): -inf for what must not be generated, else 0"""


def fold(weights: Mapping[str, np.ndarray], forbidden: Sequence[int]) -> Folded[np.ndarray]:
    """weights: a decoder's, by name (`DecoderConfig.shapes`)."""
    bias = weights["lstm.bias_ih_l0"] + weights["lstm.bias_hh_l0"]
    mask = np.zeros_like(weights["output.bias"])
    mask[list(forbidden)] = -np.inf
    return Folded(
        embed_image=weights["embed_image.weight"],
        image_bias=weights["embed_image.bias"],
        input=weights["lstm.weight_ih_l0"],
        input_bias=bias,
        table=weights["embed_token.weight"] @ weights["lstm.weight_ih_l0"].T + bias,
        product=np.concatenate([weights["lstm.weight_hh_l0"], weights["output.weight"]]),
        product_bias=np.concatenate([np.zeros_like(bias), weights["output.bias"]]),
        mask=mask,
    )


class FoldedState(NamedTuple, Generic[Array]):
    recurrent: Array
    """(R, 4H): what the captions so far add to the next gates."""
    cell: Array
    """(R, H)"""
