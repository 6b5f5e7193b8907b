"""JSON schemas that a grammar can hold an answer to.

xgrammar passes over keywords that a grammar cannot express, and an answer would then break a rule
that its client counts on. Such schemas are refused here, by the keyword's name, and so are those
that no finite document satisfies.
"""

import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from latentcore.errors import RequestError

MAX_SCHEMA_DEPTH = 64
"""Deepest nesting of a JSON schema."""

_UNSUPPORTED = (
    "not",
    "if",
    "contains",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "$dynamicRef",
    "$recursiveRef",
)
_SHAPES_OF_TEXT = ("pattern", "format")
_RANGES = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_BOUNDS = {
    "string": ("minLength", "maxLength", *_SHAPES_OF_TEXT),
    "number": (*_RANGES, "multipleOf"),
    "array": ("minItems", "maxItems"),
    "object": ("minProperties", "maxProperties", "required", "patternProperties", "propertyNames"),
}
"""Keywords that the compiler heeds only where it knows that the value is of this type."""
_IMPLY_A_TYPE = (
    *("properties", "additionalProperties", "unevaluatedProperties"),
    *("items", "prefixItems", "unevaluatedItems"),
)
_WHOLE = ("$ref", "const", "enum", "anyOf", "oneOf")
"""Keywords beside which the compiler passes over all others."""
_ASSERTIONS = frozenset({"type", "allOf", *_WHOLE, *_IMPLY_A_TYPE}.union(*_BOUNDS.values()))
_SINGLE = ("additionalProperties", "items", "propertyNames", "unevaluatedItems")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPPINGS = ("properties", "patternProperties")
_ALLOF_COMPANIONS = frozenset(
    {"allOf", "title", "description", "default", "examples", "$defs", "definitions", "$schema"}
)


def check_schema(schema: Any, name: str) -> None:
    """Raises RequestError, naming the parameter `name`, for a schema that cannot be obeyed.

    `schema` is a parsed JSON document. What is wrong in other ways is left to the compiler.
    """
    _check_depth(schema, name)
    nodes: dict[int, Any] = {}
    parents: dict[int, list[int]] = {}
    keys: set[int] = set()
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if id(node) in nodes:
            continue
        nodes[id(node)] = node
        if isinstance(node, Mapping):
            if id(node) not in keys:
                _check_type_is_known(node, name)
            _check_keywords(node, name)
            # What describes keys need not say that they are strings.
            keys.add(id(node.get("propertyNames")))
        for child in _children(node, schema, name):
            parents.setdefault(id(child), []).append(id(node))
            waiting.append(child)
    # What has a finite document, found from the leaves up.
    finite: set[int] = set()
    candidates = dict.fromkeys(reversed(nodes))
    while candidates:
        key = next(iter(candidates))
        del candidates[key]
        if key not in finite and _is_finite(nodes[key], schema, name, finite):
            finite.add(key)
            candidates.update(dict.fromkeys(parents.get(key, ())))
    if id(schema) not in finite:
        raise RequestError(f"{name}: nothing satisfies this schema, it recurses for ever")


def _check_depth(schema: Any, name: str) -> None:
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [
            child
            for item in level
            for child in (
                item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
            )
        ]
        if not level:
            return
    raise RequestError(f"{name}: expected at most {MAX_SCHEMA_DEPTH} levels of nesting")


def _check_keywords(node: Mapping[str, Any], name: str) -> None:
    for keyword in _UNSUPPORTED:
        if keyword in node:
            raise RequestError(f"{name}: {keyword!r} cannot be enforced; leave it out")
    if node.get("uniqueItems"):
        raise RequestError(f"{name}: 'uniqueItems' cannot be enforced; leave it out")
    # Of these the compiler takes one and passes over the others.
    shapes = [keyword for keyword in _SHAPES_OF_TEXT if keyword in node]
    lengths = [keyword for keyword in ("minLength", "maxLength") if node.get(keyword)]
    if len(shapes) > 1 or (shapes and lengths):
        first, second = (shapes + lengths)[:2]
        raise RequestError(
            f"{name}: {first!r} and {second!r} cannot be enforced together; say it in one pattern"
        )
    if "propertyNames" in node and "unevaluatedProperties" in node:
        raise RequestError(
            f"{name}: 'unevaluatedProperties' cannot be enforced beside 'propertyNames'; leave one "
            "of them out"
        )
    _check_nothing_is_beside(node, name)
    _check_required_is_described(node, name)
    ranges = [keyword for keyword in _RANGES if keyword in node]
    if "multipleOf" in node and (ranges or node.get("type") != "integer"):
        raise RequestError(
            f"{name}: 'multipleOf' can only be enforced for integers without a range"
        )
    every = node.get("allOf")
    if isinstance(every, list) and (len(every) > 1 or not node.keys() <= _ALLOF_COMPANIONS):
        raise RequestError(
            f"{name}: 'allOf' can only be enforced where it has one schema and nothing beside it; "
            "write the schemas as one"
        )


def _check_type_is_known(node: Mapping[str, Any], name: str) -> None:
    if any(keyword in node for keyword in ("type", "allOf", *_WHOLE, *_IMPLY_A_TYPE)):
        return
    for kind, keywords in _BOUNDS.items():
        for keyword in keywords:
            if keyword in node:
                raise RequestError(
                    f"{name}: {keyword!r} can only be enforced beside 'type'; add 'type': {kind!r}"
                )


def _check_nothing_is_beside(node: Mapping[str, Any], name: str) -> None:
    for keyword in _WHOLE:
        if keyword not in node:
            continue
        for other in sorted(_ASSERTIONS.intersection(node) - {keyword}):
            if other != "type" or not _says_types_itself(node, keyword):
                raise RequestError(
                    f"{name}: {other!r} cannot be enforced beside {keyword!r}; say it there or "
                    "leave it out"
                )


def _says_types_itself(node: Mapping[str, Any], keyword: str) -> bool:
    """Whether `keyword` allows nothing but what `type` allows too."""
    allowed = _types(node)
    if keyword in ("const", "enum"):
        values = [node["const"]] if keyword == "const" else node["enum"]
        return isinstance(values, list) and all(allowed & _types_of(value) for value in values)
    branches = node[keyword]
    return isinstance(branches, list) and all(
        isinstance(branch, Mapping) and "type" in branch and _types(branch) <= allowed
        for branch in branches
    )


def _types(node: Mapping[str, Any]) -> set[str]:
    """The types that `type` names; a number may be an integer."""
    given = node.get("type")
    found = {kind for kind in (given if isinstance(given, list) else [given]) if kind in _TYPES}
    return found | {"integer"} if "number" in found else found


_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "array", "object"})


def _types_of(value: Any) -> set[str]:
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if float(value).is_integer() else {"number"}
    kinds = {str: "string", type(None): "null", list: "array", dict: "object"}
    return {kinds[type(value)]}


def _check_required_is_described(node: Mapping[str, Any], name: str) -> None:
    required, properties = node.get("required"), node.get("properties", {})
    if isinstance(required, list) and isinstance(properties, Mapping):
        for key in required:
            if isinstance(key, str) and key not in properties:
                raise RequestError(
                    f"{name}: 'required' names {key[:100]!r}, which can only be enforced where "
                    "'properties' describes it"
                )


def _children(node: Any, root: Any, name: str) -> Iterator[Any]:
    """A schema's direct subschemas, the one that it refers to included."""
    if not isinstance(node, Mapping):
        return
    if "$ref" in node:
        yield _resolve(node["$ref"], root, name)
    for keyword in _SINGLE:
        if isinstance(node.get(keyword), Mapping):
            yield node[keyword]
    for keyword in _LISTS:
        if isinstance(node.get(keyword), list):
            yield from node[keyword]
    for keyword in _MAPPINGS:
        if isinstance(node.get(keyword), Mapping):
            yield from node[keyword].values()


def _resolve(reference: Any, root: Any, name: str) -> Any:
    shown = str(reference)[:100]
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise RequestError(
            f"{name}: $ref {shown!r}: expected a place in this schema, such as '#/$defs/item'"
        )
    found = root
    for part in reference.split("/")[1:]:
        key = urllib.parse.unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            raise RequestError(f"{name}: $ref {shown!r}: there is nothing at this place")
    return found


def _is_finite(node: Any, root: Any, name: str, finite: set[int]) -> bool:
    """Whether a schema has a finite document, if just those in `finite` have one."""
    if not isinstance(node, Mapping):
        return node is not False
    if "$ref" in node:
        return id(_resolve(node["$ref"], root, name)) in finite
    if "const" in node or "enum" in node:
        return True
    for keyword in ("anyOf", "oneOf"):
        if isinstance(node.get(keyword), list):
            return any(id(branch) in finite for branch in node[keyword])
    if isinstance(node.get("allOf"), list):
        return all(id(branch) in finite for branch in node["allOf"])
    kinds = node.get("type")
    if isinstance(kinds, str):
        kinds = [kinds]
    if not isinstance(kinds, Sequence):
        kinds = ["object"] if "properties" in node else ["array"] if "items" in node else ["null"]
    return any(
        _object_is_finite(node, finite)
        if kind == "object"
        else _array_is_finite(node, finite)
        if kind == "array"
        else True
        for kind in kinds
    )


def _object_is_finite(node: Mapping[str, Any], finite: set[int]) -> bool:
    properties = node.get("properties")
    required = node.get("required")
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        return True
    needed = (properties[key] for key in required if isinstance(key, str) and key in properties)
    return all(id(schema) in finite for schema in needed)


def _array_is_finite(node: Mapping[str, Any], finite: set[int]) -> bool:
    least = node.get("minItems", 0)
    prefix = node.get("prefixItems")
    items = [*prefix] if isinstance(prefix, list) else []
    if not isinstance(least, int) or least <= 0:
        return all(id(schema) in finite for schema in items)
    if least > len(items) and isinstance(node.get("items"), Mapping):
        items.append(node["items"])
    return all(id(schema) in finite for schema in items)
