"""What a client may ask for, and what it is told otherwise."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.checkpoint import Checkpoint
from handler.config import DecoderConfig, LanguageConfig, ModelConfig, SearchConfig
from handler.errors import InvalidParameter
from handler.parameters import Parameters, describe, from_text, parse_parameters

CONFIG = ModelConfig(decoder=DecoderConfig(vocabulary_size=5), search=SearchConfig(length_penalty=0.7, max_length=17))


def test_defaults_are_those_of_the_contract_and_of_the_model() -> None:
    parameters = parse_parameters({}, CONFIG)
    assert parameters == Parameters(
        beam_size=5, max_length=17, num_captions=5, length_penalty=0.7, min_confidence=0.0, language="en"
    )


def test_as_many_captions_as_beams_unless_said_otherwise() -> None:
    assert parse_parameters({"beam_size": 3}, CONFIG).num_captions == 3
    assert parse_parameters({"beam_size": 3, "num_captions": 2}, CONFIG).num_captions == 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"beam_size": 0}, "beam_size must be an integer from 1 to 10, not 0"),
        ({"beam_size": 11}, "from 1 to 10"),
        ({"beam_size": 2.5}, "an integer"),
        ({"beam_size": "3"}, "an integer"),
        ({"beam_size": True}, "an integer"),
        ({"beam_size": None}, "an integer"),
        ({"beam_size": [3]}, "an integer"),
        ({"beam_size": 10**500}, "from 1 to 10"),
        ({"max_length": 51}, "from 1 to 50"),
        ({"num_captions": 6}, "must not exceed beam_size, which is 5"),
        ({"length_penalty": -0.1}, "from 0 to 2"),
        ({"length_penalty": float("nan")}, "from 0 to 2"),
        ({"min_confidence": float("inf")}, "from 0 to 1"),
        ({"language": "xx"}, "one of en"),
        ({"language": 7}, "a text"),
        ({"beamsize": 3}, "the parameters are beam_size, max_length, num_captions"),
        ({"": 3}, "unknown parameter"),
    ],
)
def test_what_is_wrong_is_said(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        parse_parameters(values, CONFIG)
    assert said in str(caught.value)


@pytest.mark.parametrize(("text", "value"), [("3", 3), (" 3 ", 3), ("3.0", 3), ("0.5", 0.5), ("1e0", 1)])
def test_text_of_forms_becomes_a_number(text: str, value: float) -> None:
    assert from_text("beam_size", text) == value


@pytest.mark.parametrize("text", ["", "three", "3,5", "0x3", "--", "٣x"])
def test_text_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(InvalidParameter, match="from 1 to 10"):
        from_text("beam_size", text)


@given(
    st.dictionaries(
        st.sampled_from([*Parameters.model_fields, "x"]),
        st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=4),
    )
)
def test_no_value_gets_through_outside_its_range(values: dict[str, Any]) -> None:
    try:
        parameters = parse_parameters(values, CONFIG)
    except InvalidParameter as error:
        assert len(str(error)) < 300
        return
    assert 1 <= parameters.beam_size <= 10
    assert parameters.num_captions is not None
    assert 1 <= parameters.num_captions <= parameters.beam_size
    assert 1 <= (parameters.max_length or 0) <= 50
    assert 0 <= (parameters.length_penalty or 0.0) <= 2
    assert 0 <= parameters.min_confidence <= 1


def test_a_model_of_several_languages_takes_each(checkpoint: Checkpoint) -> None:
    config = checkpoint.config.model_copy(
        update={"languages": (LanguageConfig(code="en"), LanguageConfig(code="ja", start_token="<jp>"))}
    )
    assert parse_parameters({"language": "ja"}, config).language == "ja"
    assert describe(config)["language"]["enum"] == ["en", "ja"]


def test_the_description_states_the_ranges() -> None:
    table = describe(CONFIG)
    assert set(table) == set(Parameters.model_fields)
    assert table["beam_size"] == {
        "type": "integer",
        "default": 5,
        "description": "captions kept at each step of the search",
        "minimum": 1,
        "maximum": 10,
    }
