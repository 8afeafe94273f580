"""Photo in, captions out: decoding, encoder and beam search composed. Knows nothing of HTTP."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from handler.beam_search import Hypothesis, Search, Searcher, search
from handler.checkpoint import Checkpoint, load_checkpoint, read_manifest
from handler.config import DecodingConfig, ImageLimits, LanguageConfig, ServingConfig
from handler.engine import OPENVINO_EXPORTS, Engine, is_gpu, load_engine, openvino_precision
from handler.expansion import fold
from handler.isolation import ImageReader
from handler.machine import available_cpus
from handler.parameters import Parameters, parse_parameters

ENCODER_BATCH = 16
"""Images that go through the encoder at once: more is no faster on a CPU and takes memory."""
_VARIABLES = {"engine": "CAPTION_ENGINE", "threads": "CAPTION_THREADS", "threads_alone": "CAPTION_THREADS_ALONE"}


@dataclass(frozen=True)
class PreparedImage:
    """A photo as the encoder takes it."""

    pixels: np.ndarray
    """(3, size, size), uint8"""
    width: int
    height: int
    format: str
    decode_ms: float


@dataclass(frozen=True)
class Caption:
    caption: str
    confidence: float
    """Geometric mean of the token probabilities: exp(log_likelihood / number of generated tokens)."""
    log_likelihood: float
    """Natural logarithm of the probability of the whole sentence."""
    sentence: tuple[str, ...]
    """The tokens with the start token, and with the end token unless the length limit cut the caption."""
    token_log_likelihoods: tuple[float, ...]
    """One for each generated token, that is, for each of `sentence` but the first."""


@dataclass(frozen=True)
class CaptionedImage:
    """The captions of one image, best first. The times are those of the batch that it was in."""

    captions: tuple[Caption, ...]
    image: PreparedImage
    language: str
    encode_ms: float
    search_ms: float


class Captioner:
    """A loaded model, ready to caption."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "cpu",
        engine: Engine | None = None,
        threads: int = 0,
        limits: ImageLimits | None = None,
        decoding: DecodingConfig | None = None,
    ) -> None:
        """engine: what runs the encoder; default: torch in fp32.

        threads: of OpenVINO's search, 0 is all.
        """
        self.config = checkpoint.config
        self.vocabulary = checkpoint.vocabulary
        self.digest = checkpoint.digest
        self.reader = ImageReader(limits or ImageLimits(), self.config.preprocessing, decoding or DecodingConfig())
        if engine is None:
            if checkpoint.encoder is None:
                raise ValueError("a checkpoint without its encoder needs an engine")
            from handler.torch_engine import TorchEngine

            engine = TorchEngine(checkpoint.encoder, self.config.preprocessing, name="torch-fp32", device=device)
        self.engine = engine
        self._languages = {language.code: language for language in self.config.languages}
        self.forbidden = list(self.vocabulary.never_generated)
        if self.config.search.suppress_unknown:
            self.forbidden.append(self.vocabulary.unknown_index)
        self.searcher = _searcher(checkpoint, self.forbidden, engine, threads)

    def warm_up(self) -> None:
        """Caption a grey image, alone and in a batch, so that no client waits for what is set up on first use."""
        self.reader.start()
        size = self.config.preprocessing.size
        grey = PreparedImage(np.full((3, size, size), 128, np.uint8), size, size, "PNG", 0.0)
        for count in (2, 1):
            self.caption([grey] * count, [parse_parameters({}, self.config)] * count)

    def prepare(self, data: bytes, seconds: float | None = None) -> PreparedImage:
        """Decode an image file, in `seconds` at most, and bring it to the model's size. Raises a RequestError."""
        began = time.perf_counter()
        image = self.reader.read(data, seconds)
        pixels = image.pixels.transpose(2, 0, 1)
        return PreparedImage(pixels, image.width, image.height, image.format, _milliseconds_since(began))

    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Pixels of B images (3, size, size), uint8, to features (B, 2048), float32."""
        batches = [np.stack(images[at : at + ENCODER_BATCH]) for at in range(0, len(images), ENCODER_BATCH)]
        return np.concatenate([self.engine.encode(batch) for batch in batches])

    def caption(self, images: Sequence[PreparedImage], parameters: Sequence[Parameters]) -> list[CaptionedImage]:
        """Caption prepared images together, each with its own checked parameters (`parse_parameters`)."""
        if not images:
            return []
        began = time.perf_counter()
        features = self.encode([image.pixels for image in images])
        encoded = time.perf_counter()
        found = self.search(features, parameters)
        encode_ms, search_ms = (encoded - began) * 1e3, _milliseconds_since(encoded)
        return [
            CaptionedImage(captions, image, self._language(p).code, encode_ms, search_ms)
            for captions, p, image in zip(found, parameters, images, strict=True)
        ]

    def search(self, features: np.ndarray, parameters: Sequence[Parameters]) -> list[tuple[Caption, ...]]:
        """The captions of encoded images (B, 2048), best first."""
        languages = [self._language(p) for p in parameters]
        searches = [self._search(p, language) for p, language in zip(parameters, languages, strict=True)]
        found = self.searcher(features, searches)
        return [
            self._captions(hypotheses, p, language)
            for hypotheses, p, language in zip(found, parameters, languages, strict=True)
        ]

    def _language(self, parameters: Parameters) -> LanguageConfig:
        return self._languages[parameters.language or self.config.languages[0].code]

    def _search(self, parameters: Parameters, language: LanguageConfig) -> Search:
        defaults = self.config.search
        return Search(
            start_token=self.vocabulary.index[language.start_token],
            beam_size=parameters.beam_size,
            max_length=defaults.max_length if parameters.max_length is None else parameters.max_length,
            length_penalty=defaults.length_penalty if parameters.length_penalty is None else parameters.length_penalty,
        )

    def _captions(
        self, hypotheses: Sequence[Hypothesis], parameters: Parameters, language: LanguageConfig
    ) -> tuple[Caption, ...]:
        """The best of the found captions that the client wants; of two that read the same only the better.

        Beyond the beam size there may be more, but not surely the next best.
        """
        captions: dict[str, Caption] = {}
        for hypothesis in hypotheses[: parameters.beam_size]:
            caption = self._as_text(hypothesis, language)
            if caption.confidence >= parameters.min_confidence:
                captions.setdefault(caption.caption, caption)
        return tuple(captions.values())[: parameters.num_captions or parameters.beam_size]

    def _as_text(self, hypothesis: Hypothesis, language: LanguageConfig) -> Caption:
        sentence = (language.start_token, *self.vocabulary.decode(hypothesis.tokens))
        words = [word for word in sentence[1:] if word != self.vocabulary.end]
        log_likelihood = math.fsum(hypothesis.log_likelihoods)
        return Caption(
            caption=language.separator.join(words),
            confidence=math.exp(log_likelihood / len(hypothesis.tokens)),
            log_likelihood=log_likelihood,
            sentence=sentence,
            token_log_likelihoods=hypothesis.log_likelihoods,
        )


def load_captioner(
    checkpoint: Path,
    exported: Path,
    serving: ServingConfig,
    *,
    device: str = "cpu",
    environment: Mapping[str, str] = os.environ,
) -> Captioner:
    """A model as it is served: with the engine that the environment, `serving` or the model asks for; see `handler.engine`.

    Raises CheckpointError, and ValueError when the environment asks for what there is not.
    """
    wanted = {name: environment[variable] for name, variable in _VARIABLES.items() if environment.get(variable)}
    serving = ServingConfig.model_validate(serving.model_dump() | wanted)
    threads = serving.threads or available_cpus()
    manifest = read_manifest(checkpoint)
    engine = load_engine(
        manifest.config.engine if serving.engine == "auto" else serving.engine,
        exported=exported,
        encoder_sha256=manifest.files["encoder"].sha256,
        checkpoint=checkpoint,
        preprocessing=manifest.config.preprocessing,
        device=device,
        threads=threads,
        threads_alone=serving.threads_alone,
    )
    return Captioner(
        load_checkpoint(checkpoint, with_encoder=False),
        engine=engine,
        threads=threads,
        limits=serving.limits,
        decoding=serving.decoding,
    )


def _searcher(checkpoint: Checkpoint, forbidden: Sequence[int], engine: Engine, threads: int) -> Searcher:
    """The search on the engine's device, by the same library, and on CPUs in the same precision."""
    folded, end_token = fold(checkpoint.weights, forbidden), checkpoint.vocabulary.end_index
    if engine.name.startswith("openvino"):
        from handler.openvino_search import OpenVinoSearch

        precision = "int8" if OPENVINO_EXPORTS[engine.name] == "int8" else openvino_precision(engine.name)
        return OpenVinoSearch(folded, end_token, precision=precision, threads=threads)
    if is_gpu(engine.device):
        from handler.cuda_graphs import RecordedExpander

        return partial(search, RecordedExpander(folded, engine.device), end_token=end_token)
    from handler.torch_expansion import TorchExpander

    return partial(search, TorchExpander(folded, engine.device), end_token=end_token)


def _milliseconds_since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3
