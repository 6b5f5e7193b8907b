"""Grammars: which schemas are refused, and that a bad one costs nobody else anything."""

import json
import os
import time
from typing import Any

import pytest

from latentcore.engine import structured as module
from latentcore.engine.grammar_worker import GrammarWorker
from latentcore.engine.json_schema import check_schema
from latentcore.engine.sampling_params import StructuredOutputsParams
from latentcore.engine.structured import (
    CompiledGrammar,
    GrammarCompiler,
    GrammarDeadEndError,
    GrammarTooSlowError,
    ToolCallGrammar,
    new_mask,
)
from latentcore.engine.tokenizer import Tokenizer
from latentcore.errors import RequestError
from latentcore.models.hub import DEMO_MODEL

INTEGER = {"type": "integer"}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": INTEGER,
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "children"],
        }
    },
    "$ref": "#/$defs/node",
}


@pytest.mark.parametrize(
    "schema",
    [
        {},
        True,
        {"type": "object"},
        TREE,
        {"type": ["integer", "array"], "items": {"$ref": "#"}, "minItems": 2},
        {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]},
        {"properties": {"next": {"$ref": "#"}}, "type": "object"},
        {"allOf": [INTEGER], "description": "as pydantic writes them"},
        {"definitions": {"a/b": {"c~d": INTEGER}}, "$ref": "#/definitions/a~1b/c~0d"},
        {"type": "array", "prefixItems": [INTEGER, {"type": "string"}], "items": False},
        {"properties": {"not": INTEGER, "if": INTEGER}, "required": ["not"]},
        {"type": "object", "propertyNames": {"pattern": "^a"}},
        {"type": "string", "enum": ["a", "b"], "title": "as they are often written"},
        {"type": ["integer", "null"], "enum": [1, 2.0, None]},
        {"type": "number", "anyOf": [INTEGER, {"type": "number", "minimum": 3}]},
        {"type": "integer", "minLength": 3},
        {"items": INTEGER, "minItems": 2},
    ],
)
def test_schemas_that_can_be_obeyed(schema: Any) -> None:
    check_schema(schema, "x")


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


LIST = {"type": "array", "items": {"$ref": "#"}, "minItems": 1}


@pytest.mark.parametrize(
    ("schema", "match"),
    [
        ({"$ref": "#"}, "recurses for ever"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
         "for ever"),
        ({"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}, "for ever"),
        (LIST, "for ever"),
        ({"anyOf": [LIST, {"$ref": "#/anyOf/0"}]}, "for ever"),
        (False, "nothing satisfies"),
        ({"$ref": "http://example.org/schema.json"}, "expected a place in this schema"),
        ({"$ref": "#anchor"}, "expected a place in this schema"),
        ({"$ref": 3}, "expected a place in this schema"),
        ({"$ref": "#/definitions/none"}, "there is nothing at this place"),
        ({"items": {"uniqueItems": True}}, "'uniqueItems' cannot be enforced"),
        ({"properties": {"a": {"not": INTEGER}}}, "'not' cannot be enforced"),
        ({"$defs": {"a": {"if": {}}}, "$ref": "#/$defs/a"}, "'if' cannot be enforced"),
        ({"dependentRequired": {"a": ["b"]}}, "'dependentRequired' cannot be enforced"),
        ({"allOf": [INTEGER, {"minimum": 3}]}, "'allOf' can only be enforced"),
        ({"allOf": [INTEGER], "minimum": 3}, "'allOf' can only be enforced"),
        ({"minLength": 3}, "'minLength' can only be enforced beside 'type'; add 'type': 'string'"),
        ({"pattern": "^a"}, "add 'type': 'string'"),
        ({"items": {"format": "date"}}, "add 'type': 'string'"),
        ({"properties": {"a": {"exclusiveMaximum": 3}}}, "add 'type': 'number'"),
        ({"minItems": 3}, "add 'type': 'array'"),
        ({"required": ["a"]}, "add 'type': 'object'"),
        ({"patternProperties": {"^a": INTEGER}}, "add 'type': 'object'"),
        ({"type": "object", "required": ["a"]}, "'required' names 'a'"),
        ({"properties": {"a": INTEGER}, "required": ["a", "b"]}, "'required' names 'b'"),
        ({"enum": ["ab"], "minLength": 3}, "'minLength' cannot be enforced beside 'enum'"),
        ({"enum": [1, "a"], "type": "integer"}, "'type' cannot be enforced beside 'enum'"),
        ({"const": True, "type": "integer"}, "'type' cannot be enforced beside 'const'"),
        ({"anyOf": [INTEGER], "minimum": 3}, "'minimum' cannot be enforced beside 'anyOf'"),
        ({"oneOf": [INTEGER, {}], "type": "integer"}, "'type' cannot be enforced beside 'oneOf'"),
        ({"anyOf": [INTEGER], "properties": {}}, "'properties' cannot be enforced beside 'anyOf'"),
        ({"$defs": {"i": INTEGER}, "$ref": "#/$defs/i", "minimum": 3}, "beside '[$]ref'"),
        ({"type": "object", "propertyNames": {"pattern": "^a"}, "unevaluatedProperties": False},
         "'unevaluatedProperties' cannot be enforced beside 'propertyNames'"),
        (deep(100), "at most 64 levels"),
    ],
)  # fmt: skip
def test_schemas_that_cannot_be_obeyed(schema: Any, match: str) -> None:
    with pytest.raises(RequestError, match=match) as raised:
        check_schema(schema, "response_format")
    assert str(raised.value).startswith("response_format: ")


def test_large_schemas_are_checked_quickly() -> None:
    chain = {f"n{i}": {"$ref": f"#/$defs/n{i + 1}"} for i in range(4000)}
    wide = {f"k{i}": {"$ref": "#/$defs/n0"} for i in range(4000)}
    schema = {
        "$defs": {**chain, "n4000": INTEGER},
        "type": "object",
        "properties": wide,
        "required": list(wide),
    }
    check_schema(schema, "x")


# -- the compiler ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    pytest.importorskip("xgrammar")
    found = Tokenizer.load(DEMO_MODEL)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    assert tokenizer.eos_token_id is not None
    return GrammarCompiler(
        tokenizer, vocab_size=tokenizer.vocab_size + 7, end_ids=[tokenizer.eos_token_id]
    )


def fits(grammar: CompiledGrammar, text: str, tokenizer: Tokenizer) -> bool:
    """Whether a text and an end token after it pass."""
    matcher = grammar.matcher()
    try:
        for token_id in tokenizer.encode(text, add_begin=False):
            matcher.accept(token_id)
        assert tokenizer.eos_token_id is not None
        matcher.accept(tokenizer.eos_token_id)
    except GrammarDeadEndError:
        return False
    return matcher.finished


@pytest.mark.parametrize(
    ("given", "good", "bad"),
    [
        ({"json": {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}},
         ['{"a": 1}', '{"a": -20}'], ['{"a":  1}', '{"a": 1, "b": 2}', "{}", '{"a": 1}}']),
        ({"json": TREE}, ['{"value": 1, "children": [{"value": 2, "children": []}]}'],
         ['{"value": 1}']),
        ({"json": {"type": ["string", "integer"], "minLength": 3, "minimum": 5}},
         ['"abc"', "5"], ['"ab"', "4", "null"]),
        ({"json": {"items": INTEGER, "minItems": 2}}, ["[1, 2]"], ["[]", "[1]", '["a", 1]']),
        ({"json": {"type": "object", "propertyNames": {"pattern": "^ab?$"}}}, ['{"ab": 1}'],
         ['{"b": 1}']),
        ({"json_object": True}, ["{}", '{"x": {"y": [1, "z"]}}'], ["[]", "{} ", "{"]),
        ({"regex": r"\d{2}-[äö]+"}, ["12-ä", "00-öä"], ["1-ä", "12-"]),
        ({"choice": ["yes", "no", 'a"\\b']}, ["yes", 'a"\\b'], ["ye", "yes!"]),
        ({"grammar": 'root ::= "(" root ")" | "x"'}, ["x", "((x))"], ["(x", ""]),
    ],
)  # fmt: skip
def test_grammars_hold(
    given: dict[str, Any],
    good: list[str],
    bad: list[str],
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
) -> None:
    grammar = compiler.compile(StructuredOutputsParams(**given))
    assert [text for text in good if not fits(grammar, text, tokenizer)] == []
    assert [text for text in bad if fits(grammar, text, tokenizer)] == []
    assert compiler.compile(StructuredOutputsParams(**given)) is grammar


@pytest.mark.parametrize("separator", [None, "|"])
def test_tool_calls(separator: str | None, compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    options = [
        ToolCallGrammar("add<", json.dumps({"type": "array", "items": INTEGER}), ">"),
        ToolCallGrammar("now<", json.dumps({"type": "object", "maxProperties": 0}), ">"),
    ]
    grammar = compiler.compile_tool_calls(options, separator=separator, end="END")
    assert fits(grammar, "add<[1, 2]>", tokenizer)
    assert fits(grammar, "now<{}>END", tokenizer)
    assert fits(grammar, "add<[1]>|now<{}>|add<[]>", tokenizer) is (separator is not None)
    for text in ("", "END", "add<{}>", "add<[1]>|", "sub<[1]>", "add< [1]>"):
        assert not fits(grammar, text, tokenizer)


def test_what_cannot_be_compiled_is_remembered(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = StructuredOutputsParams(regex="(a")
    with pytest.raises(RequestError, match="cannot be compiled") as raised:
        compiler.compile(bad)
    assert "/" not in str(raised.value)  # no path of the compiler's own sources
    monkeypatch.setattr(module._worker, "compile", lambda *_: pytest.fail("compiled again"))
    with pytest.raises(RequestError, match="cannot be compiled"):
        compiler.compile(bad)


CRASHING = {"type": "string", "pattern": "(" * 30_000 + ")" * 30_000}
"""xgrammar 0.2 overflows its stack over this pattern."""


def test_a_crash_of_the_compiler_is_a_request_error(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    with pytest.raises(RequestError, match="cannot be compiled"):
        compiler.compile(StructuredOutputsParams(json=CRASHING))
    grammar = compiler.compile(StructuredOutputsParams(choice=["still", "here"]))
    assert fits(grammar, "still", tokenizer)


def test_compiling_has_a_time_limit(tokenizer: Tokenizer) -> None:
    pytest.importorskip("xgrammar")
    worker = GrammarWorker(compile_seconds=0.5)
    compiler = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size, end_ids=[0])
    info = compiler._tokenizer_info().serialize_json()
    rules = "\n".join(f'r{i} ::= r{i + 1} r{i + 1} | "a"' for i in range(3000))
    slow = {"kind": "ebnf", "text": f'root ::= r0 r0\n{rules}\nr3000 ::= "a"'}
    try:
        with pytest.raises(RequestError, match=r"takes longer than 0\.5 s"):
            worker.compile(1, info, slow)
        assert "adaptive_token_mask" in worker.compile(1, info, {"kind": "regex", "text": "ab"})
        process = worker._process
        assert process is not None
        assert process.stdin is not None
        # As when its parent dies.
        process.stdin.close()
        assert process.wait(20) == 0
    finally:
        worker.close()


def test_a_slow_grammar_is_noticed(compiler: GrammarCompiler, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_SECONDS_FREE", 0.0)
    monkeypatch.setattr(module, "_SECONDS_A_TOKEN", 0.0)
    matcher = compiler.compile(StructuredOutputsParams(regex="[a-z]+")).matcher()
    matcher.fill(new_mask(compiler._vocab_size))
    while time.thread_time() == 0:
        os.getloadavg()
    with pytest.raises(GrammarTooSlowError, match="too slow"):
        matcher.accept(compiler._tokenizer.encode("a", add_begin=False)[0])
