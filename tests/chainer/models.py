"""Random models in chainer-caption's layout, the same from the same seed everywhere.

Runs in the project's environment and in Chainer's own alike, so it needs numpy and h5py only. `numpy.random.RandomState`
is frozen by numpy's compatibility policy (NEP 19), so the golden files need not hold any weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

FEATURES = 2048
STAGES = {"res2": (3, 64, 256), "res3": (4, 128, 512), "res4": (6, 256, 1024), "res5": (3, 512, 2048)}
"""Blocks, inner channels and outer channels of each."""
BATCH_NORM = ("gamma", "beta", "avg_mean", "avg_var", "N")

CNN_FILE, DECODER_FILE, VOCABULARY_FILE = "ResNet50.model", "caption_model.model", "dictionary.json"
END_BIAS = 4.0

Weights = dict[str, np.ndarray]
"""Dataset path to values."""


@dataclass(frozen=True)
class ModelFiles:
    """The three files that chainer-caption's commands take."""

    cnn: Path
    rnn: Path
    vocabulary: Path


def write_models(folder: Path, vocabulary: Mapping[str, int], *, hidden: int, seed: int) -> ModelFiles:
    """A whole random model of full size, whose captions depend on the photo.

    vocabulary: word to index.
    """
    files = ModelFiles(folder / CNN_FILE, folder / DECODER_FILE, folder / VOCABULARY_FILE)
    files.vocabulary.write_text(json.dumps(vocabulary, indent=4, sort_keys=True), encoding="utf-8")
    write_hdf5(files.cnn, random_cnn(seed))
    write_hdf5(files.rnn, random_decoder(len(vocabulary), hidden, end=vocabulary["<eos>"], seed=seed))
    return files


def write_hdf5(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """What `chainer.serializers.save_hdf5` writes, but uncompressed."""
    with h5py.File(path, "w") as file:
        for name, values in weights.items():
            file.create_dataset(name, data=values)


def vocabulary_of(special: Mapping[str, int], size: int, word: Callable[[int], str]) -> dict[str, int]:
    """Special tokens at their indices, which chainer-caption left to a hash table, and made-up words at all others."""
    indices = sorted(set(range(size)) - set(special.values()))
    return {**special, **{word(index): index for index in indices}}


def cnn_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"fc/W": (1000, FEATURES), "fc/b": (1000,)}

    def convolution(link: str, number: str, outputs: int, inputs: int, kernel: int) -> None:
        shapes[f"{link}conv{number}/W"] = (outputs, inputs, kernel, kernel)
        shapes.update({f"{link}bn{number}/{name}": (outputs,) if name != "N" else () for name in BATCH_NORM})

    convolution("", "1", 64, 3, 7)
    inputs = 64
    for stage, (blocks, inner, outer) in STAGES.items():
        for block in range(blocks):
            link = f"{stage}/b{block}/" if block else f"{stage}/a/"
            convolution(link, "1", inner, inputs, 1)
            convolution(link, "2", inner, inner, 3)
            convolution(link, "3", outer, inner, 1)
            if not block:
                convolution(link, "4", outer, inputs, 1)
            inputs = outer
    return shapes


def decoder_shapes(vocabulary_size: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        "embed_word/W": (vocabulary_size, hidden),
        "embed_image/W": (hidden, FEATURES),
        "embed_image/b": (hidden,),
        **{f"lstm/0/w{gate}": (hidden, hidden) for gate in range(8)},
        **{f"lstm/0/b{gate}": (hidden,) for gate in range(8)},
        "decode_word/W": (vocabulary_size, hidden),
        "decode_word/b": (vocabulary_size,),
    }


def random_cnn(seed: int) -> Weights:
    """He-initialised convolutions, each batch norm with statistics of its own that keep activations at a scale of one.

    Filters have mean zero: else the mean of the rectified inputs, which is the same for every photo, drowns the photo.
    """
    random = np.random.RandomState(seed)
    weights: Weights = {}
    for name, shape in sorted(cnn_shapes().items()):
        link, _, kind = name.rpartition("/")
        if kind == "N":
            values = np.array(100)
        elif kind == "W":
            values = random.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
            values -= values.mean(axis=tuple(range(1, len(shape))), keepdims=True)
        elif kind == "gamma":
            values = random.uniform(0.5, 1.0, shape)
        elif kind == "avg_var":
            values = random.uniform(0.3, 1.0, shape) * (5000 if link == "bn1" else 1)  # pixels are not normalised
        else:  # beta, avg_mean, b
            values = random.standard_normal(shape) * 0.1
        weights[name] = values if kind == "N" else values.astype(np.float32)
    return weights


def random_decoder(vocabulary_size: int, hidden: int, *, end: int, seed: int) -> Weights:
    """Words and photo matter at every step, and the LSTM remembers.

    end: the index of `<eos>`, which gets a bias so that captions of many lengths are found.
    """
    random = np.random.RandomState(seed)
    scales = {"embed_word/W": 1.0, "embed_image/W": 0.5 / math.sqrt(FEATURES), "decode_word/W": 6.0 / math.sqrt(hidden)}
    weights: Weights = {}
    for name, shape in sorted(decoder_shapes(vocabulary_size, hidden).items()):
        scale = scales.get(name, 2.5 / math.sqrt(hidden) if len(shape) == 2 else 0.5)
        weights[name] = (random.standard_normal(shape) * scale).astype(np.float32)
    weights["decode_word/b"][end] += END_BIAS
    return weights
