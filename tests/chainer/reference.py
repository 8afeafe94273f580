"""What Chainer itself makes of a model: features, step probabilities, captions.

Runs in Chainer's own environment: `.venv-chainer/bin/python -m tests.chainer.reference CASE.json`. Written from the
rules of chainer-caption, on Chainer's links, and shares nothing with `handler/`, so that agreement means something.
"""

from __future__ import annotations

import heapq
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from PIL import Image

from tests.chainer.models import CNN_FILE, DECODER_FILE, FEATURES, STAGES, Weights, random_cnn, random_decoder
from tests.chainer.photos import photos

SIZE = 224
MEAN_BGR = np.array([103.939, 116.779, 123.68], np.float32)


class BottleneckA(chainer.Chain):
    """The first block of a stage: its stride is on the first convolution, its shortcut is a projection."""

    def __init__(self, inputs: int, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(inputs, inner, 1, stride, 0, nobias=True)
            self.bn1 = L.BatchNormalization(inner)
            self.conv2 = L.Convolution2D(inner, inner, 3, 1, 1, nobias=True)
            self.bn2 = L.BatchNormalization(inner)
            self.conv3 = L.Convolution2D(inner, outer, 1, 1, 0, nobias=True)
            self.bn3 = L.BatchNormalization(outer)
            self.conv4 = L.Convolution2D(inputs, outer, 1, stride, 0, nobias=True)
            self.bn4 = L.BatchNormalization(outer)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + self.bn4(self.conv4(x)))


class BottleneckB(chainer.Chain):
    def __init__(self, outer: int, inner: int) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(outer, inner, 1, 1, 0, nobias=True)
            self.bn1 = L.BatchNormalization(inner)
            self.conv2 = L.Convolution2D(inner, inner, 3, 1, 1, nobias=True)
            self.bn2 = L.BatchNormalization(inner)
            self.conv3 = L.Convolution2D(inner, outer, 1, 1, 0, nobias=True)
            self.bn3 = L.BatchNormalization(outer)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + x)


class ResNet(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        inputs = 64
        with self.init_scope():
            self.conv1 = L.Convolution2D(3, inputs, 7, 2, 3, nobias=True)
            self.bn1 = L.BatchNormalization(inputs)
            for stage, (blocks, inner, outer) in STAGES.items():
                chain = chainer.Chain()
                chain.add_link("a", BottleneckA(inputs, inner, outer, 1 if stage == "res2" else 2))
                for block in range(1, blocks):
                    chain.add_link(f"b{block}", BottleneckB(outer, inner))
                setattr(self, stage, chain)
                inputs = outer
            self.fc = L.Linear(FEATURES, 1000)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """(B, 3, 224, 224) to features (B, 2048)."""
        h = F.max_pooling_2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2)
        for stage, (blocks, _, _) in STAGES.items():
            for name in ("a", *(f"b{block}" for block in range(1, blocks))):
                h = self[stage][name](h)
        return F.average_pooling_2d(h, 7, stride=1).array.reshape(len(x), FEATURES)


class Decoder(chainer.Chain):
    def __init__(self, vocabulary_size: int, hidden: int) -> None:
        super().__init__()
        with self.init_scope():
            self.embed_word = L.EmbedID(vocabulary_size, hidden)
            self.embed_image = L.Linear(FEATURES, hidden)
            self.lstm = L.NStepLSTM(1, hidden, hidden, 0.5)
            self.decode_word = L.Linear(hidden, vocabulary_size)

    def start(self, feature: np.ndarray) -> tuple[chainer.Variable, chainer.Variable]:
        """(2048,) to the state (h, c) after the image."""
        h, c, _ = self.lstm(None, None, [self.embed_image(feature[None])])
        return h, c

    def step(
        self, h: chainer.Variable, c: chainer.Variable, word: int
    ) -> tuple[chainer.Variable, chainer.Variable, np.ndarray]:
        """The state after `word`, and the probabilities (V,) of the next one."""
        h, c, ys = self.lstm(h, c, [self.embed_word(np.array([word], np.int32))])
        return h, c, F.softmax(self.decode_word(ys[0])).array[0]


class State(NamedTuple):
    h: chainer.Variable
    c: chainer.Variable
    path: list[int]
    cost: float


def beam_search(decoder: Decoder, feature: np.ndarray, start: int, end: int, beam: int, depth: int) -> list[State]:
    """All found captions, cheapest first."""
    live, found = [State(*decoder.start(feature), [start], 0.0)], []
    while live and len(found) < beam:
        extensions = []
        for state in live:
            h, c, probabilities = decoder.step(state.h, state.c, state.path[-1])
            for word in np.argsort(-probabilities, kind="stable")[:beam]:
                cost = state.cost - float(np.log(probabilities[word]))
                extensions.append(State(h, c, [*state.path, int(word)], cost))
        live = []
        for state in heapq.nsmallest(beam, extensions, key=lambda state: state.cost):
            (found if state.path[-1] == end or len(state.path) == depth else live).append(state)
    return sorted(found, key=lambda state: state.cost)


def nearest_positions(length: int, resized: int) -> np.ndarray:
    """Which of `length` pixels the nearest-neighbour filter of Pillow 4.0 (2017) takes for each of `resized`.

    libImaging/Geometry.c, ImagingScaleAffine: centres of pixels, added up in double precision, so ties fall where the
    rounding errors of the sum put them.
    """
    scale = length / resized
    return np.add.accumulate(np.concatenate([[0.5 * scale], np.full(resized - 1, scale)])).astype(int)


def preprocess(file: bytes) -> np.ndarray:
    """An image file to the network's input (3, 224, 224)."""
    image = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    height, width = image.shape[:2]
    new_width, new_height = (SIZE * width // height, SIZE) if width > height else (SIZE, SIZE * height // width)
    left, top = (new_width - SIZE) // 2, (new_height - SIZE) // 2
    rows = nearest_positions(height, new_height)[top : top + SIZE]
    columns = nearest_positions(width, new_width)[left : left + SIZE]
    bgr = image[rows][:, columns][:, :, ::-1].astype(np.float32)
    return (bgr - MEAN_BGR).transpose(2, 0, 1)


def fill(link: chainer.Link, weights: Weights) -> None:
    """Give every parameter and statistic of `link` its values, as `load_hdf5` would."""
    serializer = chainer.serializers.DictionarySerializer()
    serializer.save(link)
    assert set(serializer.target) == set(weights), set(serializer.target) ^ set(weights)
    chainer.serializers.NpzDeserializer(weights).load(link)


def captions(decoder: Decoder, features: np.ndarray, case: dict[str, Any]) -> list[dict[str, Any]]:
    """Every search of the case on every photo."""
    special = case["special"]
    return [
        {
            "photo": photo,
            "start": start,
            "beam": beam,
            "depth": depth,
            "found": [
                {"path": state.path, "log_likelihood": -state.cost}
                for state in beam_search(decoder, feature, special[start], special["<eos>"], beam, depth)
            ],
        }
        for photo, feature in zip(case["photos"], features, strict=True)
        for start in case["starts"]
        for beam in case["beams"]
        for depth in case["depths"]
    ]


def step_probabilities(decoder: Decoder, feature: np.ndarray, words: Sequence[int]) -> np.ndarray:
    """(len(words), V): the probabilities after each word."""
    h, c = decoder.start(feature)
    rows = []
    for word in words:
        h, c, probabilities = decoder.step(h, c, word)
        rows.append(probabilities)
    return np.stack(rows)


def main() -> None:
    """Read a case, write beside it the models, `features.npy`, `probabilities.npy` and `captions.json`.

    The photos of a case are names of photos.py, or else image files.
    """
    path = Path(sys.argv[1])
    case = json.loads(path.read_text())
    folder = path.parent
    cnn, decoder = ResNet(), Decoder(case["vocabulary_size"], case["hidden"])
    fill(cnn, random_cnn(case["seed"]))
    fill(decoder, random_decoder(case["vocabulary_size"], case["hidden"], end=case["special"]["<eos>"], seed=case["seed"]))
    chainer.serializers.save_hdf5(str(folder / CNN_FILE), cnn)
    chainer.serializers.save_hdf5(str(folder / DECODER_FILE), decoder)
    made = photos()
    files = [made[name] if name in made else Path(name).read_bytes() for name in case["photos"]]
    with chainer.using_config("train", False), chainer.no_backprop_mode():
        features = np.concatenate([cnn(preprocess(file)[None]) for file in files])
        np.save(folder / "features.npy", features)
        np.save(folder / "probabilities.npy", step_probabilities(decoder, features[0], case["words"]))
        found = captions(decoder, features, case)
    (folder / "captions.json").write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")


if __name__ == "__main__":
    main()
