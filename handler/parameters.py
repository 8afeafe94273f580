"""What a client may ask for: the one definition of the request parameters, their ranges and defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError, model_validator

from handler.config import Config, ModelConfig
from handler.errors import InvalidParameter

MAX_BEAM_SIZE = 10
MAX_LENGTH = 50


class Parameters(Config):
    """Parameters of a request; `None` stands for the default of the model."""

    beam_size: int = Field(default=5, ge=1, le=MAX_BEAM_SIZE, description="captions kept at each step of the search")
    max_length: int | None = Field(default=None, ge=1, le=MAX_LENGTH, description="tokens of a caption at most")
    num_captions: int | None = Field(
        default=None, ge=1, le=MAX_BEAM_SIZE, description="captions in the answer at most; not more than beam_size, its default"
    )
    length_penalty: float | None = Field(
        default=None,
        ge=0,
        le=2,
        allow_inf_nan=False,
        description="0 prefers likely captions, which are short; higher values longer ones",
    )
    min_confidence: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False, description="captions below it are left out")
    language: str | None = Field(default=None, max_length=35, description="one of the model's languages")

    @model_validator(mode="after")
    def _not_more_captions_than_beams(self) -> Parameters:
        if self.num_captions is not None and self.num_captions > self.beam_size:
            raise ValueError(f"num_captions must not exceed beam_size, which is {self.beam_size}")
        return self


NAMES = ", ".join(Parameters.model_fields)


def parse_parameters(values: Mapping[str, Any], config: ModelConfig) -> Parameters:
    """Check the parameters of a request; those not given take the model's defaults.

    values: JSON values, or text (bytes or str) as forms and query strings carry it; see `from_text`.

    Raises InvalidParameter, whose message lists what is valid.
    """
    unknown = [name for name in values if name not in Parameters.model_fields]
    if unknown:
        raise InvalidParameter(f"unknown parameter {_shown(unknown[0])}: the parameters are {NAMES}")
    for name, value in values.items():
        wanted = (str,) if name == "language" else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise InvalidParameter(f"{name} must be {_range(name)}, not {_shown(value)}")
    try:
        parameters = Parameters(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if not first["loc"]:
            raise InvalidParameter(first["msg"].removeprefix("Value error, ")) from None
        name = str(first["loc"][0])
        raise InvalidParameter(f"{name} must be {_range(name)}, not {_shown(values[name])}") from None
    codes = [language.code for language in config.languages]
    if parameters.language is not None and parameters.language not in codes:
        raise InvalidParameter(f"language must be one of {', '.join(codes)}, not {_shown(parameters.language)}")
    defaults: dict[str, Any] = {
        "max_length": config.search.max_length,
        "num_captions": parameters.beam_size,
        "length_penalty": config.search.length_penalty,
        "language": codes[0],
    }
    return parameters.model_copy(update={name: value for name, value in defaults.items() if getattr(parameters, name) is None})


def from_text(name: str, text: str) -> int | float | str:
    """The value of a form field or query parameter. Raises InvalidParameter."""
    if name == "language" or name not in Parameters.model_fields:
        return text
    try:
        number = float(text)
        return int(number) if number.is_integer() else number
    except ValueError:
        raise InvalidParameter(f"{name} must be {_range(name)}, not {_shown(text)}") from None


def describe(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """Name, type, range, default and meaning of each parameter, for clients."""
    defaults = parse_parameters({}, config)
    table: dict[str, dict[str, Any]] = {}
    for name, field in Parameters.model_fields.items():
        table[name] = {"type": _type(name), "default": getattr(defaults, name), "description": field.description}
        low, high = _bounds(name)
        if low is not None:
            table[name] |= {"minimum": low, "maximum": high}
    table["language"]["enum"] = [language.code for language in config.languages]
    table["num_captions"]["default"] = "beam_size"
    return table


def _type(name: str) -> str:
    annotation = str(Parameters.model_fields[name].annotation)
    return "integer" if "int" in annotation else "number" if "float" in annotation else "string"


def _bounds(name: str) -> tuple[float | None, float | None]:
    metadata = Parameters.model_fields[name].metadata
    low = next((m.ge for m in metadata if hasattr(m, "ge")), None)
    return low, next((m.le for m in metadata if hasattr(m, "le")), None)


def _range(name: str) -> str:
    low, high = _bounds(name)
    kind = {"integer": "an integer", "number": "a number", "string": "a text"}[_type(name)]
    return kind if low is None else f"{kind} from {low} to {high}"


def _shown(value: object) -> str:
    """A client's value, short and printable, for a message."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "…"
