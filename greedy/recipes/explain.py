"""A validation error as one sentence: the field, its value, what is allowed."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from greedy.base.text import did_you_mean
from greedy.recipes.limits import Unshown
from greedy.recipes.schema import SECTIONS, Recipe


def sentence(errors: list[ErrorDetails], document: Mapping[str, Any]) -> str:
    """Returns the first error of a document in words, and how many more fields are wrong."""
    keys: dict[str, ErrorDetails] = {}
    for error in errors:  # a union reports one error for each of its types
        keys.setdefault(".".join(str(part) for part in error["loc"][: _depth(error)]), error)
    (key, first), *others = keys.items()
    more = f" (and {len(others)} more)" if others else ""
    return _explained(key, first, document) + more


def allowed(key: str) -> str:
    """Returns what a field may be, from its schema: ``training.batch_size`` gives "a whole number
    of at least 2"."""
    section, _, field = key.rpartition(".")
    model: type[BaseModel] = SECTIONS[section] if section else Recipe
    return _words(model.model_json_schema()["properties"][field])


def _depth(error: ErrorDetails) -> int:
    return 2 if error["loc"][0] in SECTIONS else 1


def _explained(key: str, error: ErrorDetails, document: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return f"{key} is not a recipe field; {_advice(key)}"
    if key in SECTIONS:
        return f"{key} must be a section with {', '.join(SECTIONS[key].model_fields)}"
    if error["type"] == "value_error" and isinstance(error["ctx"]["error"], Unshown):
        return f"{key} must {error['ctx']['error']}"
    value: Any = document
    for part in key.split("."):
        value = value.get(part)
    shown = "not set" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    if error["type"] == "string_unicode":
        return (
            f"{key} is {shown}, which is not UTF-8, as TOML must be: rename the file or folder, "
            f"or give a link to it"
        )
    if error["type"] == "value_error":
        return f"{key} is {shown} but must {error['ctx']['error']}"
    field = allowed(key)
    choices = field.partition("one of ")[2].split(", ")
    hint = did_you_mean(str(value), choices)
    return f"{key} is {shown} but must be {field}{hint and '; '}{hint}"


def _advice(key: str) -> str:
    """Returns which field a misplaced or mistyped key may stand for, else the fields of its
    section."""
    section, _, field = key.rpartition(".")
    models: dict[str, type[BaseModel]] = {"": Recipe, **SECTIONS}
    homes: dict[str, list[str]] = {}
    for home, model in models.items():
        for name in model.model_fields:
            homes.setdefault(name, []).append(f"{home}.{name}".lstrip("."))
    own = models[section].model_fields
    if field in homes:
        meant = homes[field]
    elif matches := get_close_matches(field, own, n=1):
        meant = [f"{section}.{matches[0]}".lstrip(".")]
    elif matches := get_close_matches(field, homes, n=1):
        meant = homes[matches[0]]
    else:
        return f"{section or 'a recipe'} has {', '.join(own)}"
    return f"did you mean {' or '.join(meant)}?"


def _words(schema: Mapping[str, Any], several: bool = False) -> str:
    """Returns a field's JSON schema in English, in the plural for the entries of a list."""
    if "anyOf" in schema:
        kinds = [_words(kind) for kind in schema["anyOf"] if kind["type"] != "null"]
        return " or ".join(kinds)
    if "pattern" in schema:
        return str(schema["description"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "const" in schema:
        return str(schema["const"])
    if schema["type"] == "array":
        return f"{'lists' if several else 'a list'} of {_words(schema['items'], several=True)}"
    singular, plural = {
        "integer": ("a whole number", "whole numbers"),
        "number": ("a number", "numbers"),
        "string": ("text", "texts"),
        "boolean": ("true or false", "true or false"),
    }[schema["type"]]
    bounds = [
        f"{phrase} {schema[bound]:g}"
        for bound, phrase in (
            ("minimum", "of at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "and at most"),
            ("exclusiveMaximum", "and below"),
        )
        if bound in schema
    ]
    return " ".join([plural if several else singular, *bounds])
