"""Every sampling parameter is checked, and the message names it, the limits and what was found."""

import dataclasses
import math
from typing import Any

import pytest

from latentcore.engine.sampling_params import SamplingParams, StructuredOutputsParams
from latentcore.errors import RequestError


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.max_tokens) == (1, 1.0, 1.0, 16)
    assert not params.greedy
    assert SamplingParams(temperature=0).greedy


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("n", 0, "from 1 to 128"),
        ("n", 129, "from 1 to 128"),
        ("n", 1.0, "a whole number"),
        ("n", True, "a whole number"),
        ("temperature", -0.1, "from 0 to 100"),
        ("temperature", math.nan, "from 0 to 100"),
        ("temperature", math.inf, "from 0 to 100"),
        ("temperature", "hot", "a number"),
        ("top_p", 0.0, "above 0 up to 1"),
        ("top_p", 1.01, "above 0 up to 1"),
        ("top_k", -2, "of at least -1"),
        ("top_k", 2.5, "a whole number"),
        ("min_p", 1.5, "from 0 to 1"),
        ("presence_penalty", 2.1, "from -2 to 2"),
        ("frequency_penalty", -2.1, "from -2 to 2"),
        ("repetition_penalty", 0.0, "above 0"),
        ("seed", 2**63, "a whole number"),
        ("seed", 1.5, "a whole number"),
        ("max_tokens", -1, "of at least 0"),
        ("max_tokens", 10**12, "of at least 0"),
        ("min_tokens", -1, "of at least 0"),
        ("logprobs", 129, "from 0 to 128"),
        ("prompt_logprobs", -1, "from 0 to 128"),
        ("stop", "", "not empty"),
        ("stop", ["a", ""], "not empty"),
        ("stop", [3], "not empty"),
        ("stop", 3, "a string or a list"),
        ("stop", ["a"] * 65, "at most 64"),
        ("stop", "a" * 5000, "at most 4096"),
        ("stop_token_ids", [1.5], "a whole number"),
        ("stop_token_ids", "12", "a list of token ids"),
        ("ignore_eos", 1, "true or false"),
        ("logit_bias", [1], "a mapping"),
        ("logit_bias", {"x": 1.0}, "a whole number"),
        ("logit_bias", {"1": 101}, "from -100 to 100"),
        ("structured_outputs", {"json": {}}, "StructuredOutputsParams"),
        ("output_kind", 1, "RequestOutputKind"),
    ],
)
def test_values_out_of_range_are_named(name: str, value: Any, limits: str) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**{name: value})
    assert str(error.value).startswith(f"{name}: expected ")
    assert limits in str(error.value)
    assert "found" in str(error.value)


def test_combinations_that_contradict_each_other() -> None:
    with pytest.raises(RequestError, match="min_tokens: expected at most max_tokens"):
        SamplingParams(max_tokens=3, min_tokens=4)
    with pytest.raises(RequestError, match="stop strings need detokenize"):
        SamplingParams(stop="x", detokenize=False)
    with pytest.raises(RequestError, match="min_tokens: cannot be combined"):
        SamplingParams(min_tokens=1, structured_outputs=StructuredOutputsParams(regex="a"))


def test_forms_are_made_one() -> None:
    params = SamplingParams(stop="x", stop_token_ids=[1, 2], logit_bias={"5": 1, 6: 2})  # type: ignore[dict-item]
    assert params.stop_strings == ("x",)
    assert params.stop_tokens == (1, 2)
    assert params.biases == {5: 1.0, 6: 2.0}
    again = params.replace(n=2)
    assert (again.n, again.stop_strings) == (2, ("x",))


def test_parameters_cannot_be_changed_unchecked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "found none"),
        ({"json": {}, "regex": "a"}, "found json, regex"),
        ({"json": "{"}, "not a JSON document"),
        ({"json": "[1]"}, "expected a JSON schema"),
        ({"regex": ""}, "structured_outputs.regex"),
        ({"grammar": 3}, "structured_outputs.grammar"),
        ({"choice": []}, "a list of strings"),
        ({"choice": "ab"}, "a list of strings"),
        ({"choice": ["a", 1]}, "not empty"),
    ],
)
def test_structured_outputs_are_checked(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        StructuredOutputsParams(**fields)
