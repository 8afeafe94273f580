"""What a model is, in full: the configuration that is saved in every checkpoint.

All classes are frozen and reject unknown keys, so that a checkpoint of a newer or foreign version is noticed instead of
being half understood.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Tokenization = Literal["word", "character"]
EngineName = Literal["auto", "torch-fp32", "torch-bf16", "torch-fp16", "openvino-fp32", "openvino-bf16", "openvino-int8"]
WRITTEN_WITHOUT_SPACES = ("ja", "km", "lo", "my", "th", "zh")
"""Languages without spaces between words, by their BCP 47 codes."""


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PreprocessingConfig(Config):
    """From an upright RGB photo to the encoder's input: `(pixel * scale - mean) / std` for each channel."""

    size: int = Field(default=224, ge=32, le=1024)
    """Side of the square input in pixels."""
    fit: Literal["stretch", "crop"] = "stretch"
    """`stretch`: the whole photo, aspect ratio given up. `crop`: shorter side to `size`, then the centre square."""
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    """Pillow's filters; bilinear and bicubic are antialiased, nearest is not."""
    channel_order: Literal["RGB", "BGR"] = "RGB"
    scale: float = 1 / 255
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """In the order of `channel_order`."""
    std: tuple[float, float, float] = IMAGENET_STD


class EncoderConfig(Config):
    architecture: Literal["resnet50-torchvision", "resnet50-caffe"] = "resnet50-torchvision"
    """`torchvision` is v1.5 (stride on the 3x3 convolution). `caffe` is He et al.'s v1 as Chainer runs it: stride on the
    first 1x1 convolution, max pooling without padding in ceil mode, batch-norm epsilon 2e-5."""


class DecoderConfig(Config):
    vocabulary_size: int = Field(ge=3)
    feature_size: int = 2048
    embedding_size: int = Field(default=512, ge=1)
    hidden_size: int = Field(default=512, ge=1)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    """On the embeddings and on the LSTM's output, while training."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the weights, by their names in `handler.decoder.Decoder`."""
        features, embedding, words, gates = self.feature_size, self.embedding_size, self.vocabulary_size, 4 * self.hidden_size
        return {
            "embed_image.weight": (embedding, features),
            "embed_image.bias": (embedding,),
            "embed_token.weight": (words, embedding),
            "lstm.weight_ih_l0": (gates, embedding),
            "lstm.weight_hh_l0": (gates, self.hidden_size),
            "lstm.bias_ih_l0": (gates,),
            "lstm.bias_hh_l0": (gates,),
            "output.weight": (words, self.hidden_size),
            "output.bias": (words,),
        }


class LanguageConfig(Config):
    """One language that the model writes. Several share a decoder when they differ in their first token."""

    code: str
    """BCP 47, such as `en`, `zh`, `ja`."""
    start_token: str = "<sos>"
    tokenization: Tokenization = "word"

    @property
    def separator(self) -> str:
        """What stands between two tokens of a caption."""
        spaced = self.tokenization == "word" and self.code.partition("-")[0] not in WRITTEN_WITHOUT_SPACES
        return " " if spaced else ""


class SearchConfig(Config):
    """The model's own settings of the search; a request overrides the first two."""

    length_penalty: float = Field(default=0.0, ge=0, le=2)
    max_length: int = Field(default=20, ge=1, le=50)
    suppress_unknown: bool = True
    """Never generate the token for unknown words."""


class ModelConfig(Config):
    name: str = "caption"
    version: str = "1.0"
    languages: tuple[LanguageConfig, ...] = (LanguageConfig(code="en"),)
    """The first is the default."""
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig
    search: SearchConfig = SearchConfig()
    engine: EngineName = "auto"
    """What runs the encoder where the deployment does not say; `torch-fp32` for a model whose numbers must be exact."""

    @model_validator(mode="after")
    def _languages_differ(self) -> Self:
        codes = [language.code for language in self.languages]
        if not codes or len(set(codes)) != len(codes):
            raise ValueError("languages must be at least one, each with a code of its own")
        return self


class ImageLimits(Config):
    """Which images are decoded at all. Judged from the header, before any pixel is."""

    max_bytes: int = Field(default=20 * 2**20, ge=1)
    max_pixels: int = Field(default=50_000_000, ge=1)
    max_side: int = Field(default=16_000, ge=1)


class DecodingConfig(Config):
    """What decoding an image may cost; see handler/isolation.py."""

    seconds: float = Field(default=6.0, gt=0)
    """For all images of one request together. Times the batch size it must stay below `responseTimeout`."""
    memory_mib: int = Field(default=1024, ge=256)
    """50 megapixels need up to 800 MiB, as WebP."""


class ServingConfig(Config):
    """Settings of a deployment, not of a model: the key `caption` of the archive's model-config.yaml."""

    limits: ImageLimits = ImageLimits()
    decoding: DecodingConfig = DecodingConfig()
    max_instances: int = Field(default=32, ge=1)
    """Images in one JSON request."""
    access_log: bool = True
    """A line of JSON for each request; see handler/access_log.py."""
    engine: EngineName = "auto"
    """What runs the encoder; see handler/engine.py. The environment variable CAPTION_ENGINE overrides it."""
    threads: int = Field(default=0, ge=0)
    """Of each worker; 0 is one for each CPU that it may use. The environment variable CAPTION_THREADS overrides it."""
    threads_alone: int = Field(default=0, ge=0)
    """Of each worker for an image that comes alone, where that is more than `threads`; OpenVINO only, and at the price of
    a second copy of the encoder. The environment variable CAPTION_THREADS_ALONE overrides it."""
