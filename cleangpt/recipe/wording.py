"""What a recipe's keys may hold, in words: for `--help` and for errors."""

import difflib
import json
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from .keys import Recipe

HELP = """usage: train.py RECIPE.yaml [--section.key=value ...]

Trains the model of a recipe. Every key of the file can also be set on the command line:
"""


def help_text() -> str:
    """Every key with its default, its meaning and what it may hold."""
    return "\n".join((HELP, *_help_lines(Recipe)))


def _help_lines(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if name == "branched_from":
            continue  # written by a run
        if inner := section_in(field.annotation):
            if not prefix:
                yield f"\n{name}: {inner.__doc__}"
            yield from _help_lines(inner, f"{prefix}{name}.")
        elif name == "model":
            yield "\nmodel: The network."
            yield _entry("--model.KEY", field.description or "")
        else:
            default = json.dumps(field.get_default(call_default_factory=True), default=str)
            head = f"--{prefix}{name}" + ("" if field.is_required() else f"  [{default}]")
            yield _entry(head, f"{field.description} ({allowed(field.annotation, field.metadata)})")


def _entry(head: str, text: str) -> str:
    return f"  {head}\n" + textwrap.indent(textwrap.fill(" ".join(text.split()), 104), " " * 6)


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section in `Section` or `Section | None`."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    only = [option for option in options if option is not types.NoneType]
    return only[0] if len(only) == 1 and isinstance(only[0], type) and issubclass(only[0], BaseModel) else None


def allowed(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a key with this annotation may hold: "a whole number from 1 or null", say."""
    texts = [text for text in (*metadata, *getattr(annotation, "__metadata__", ())) if isinstance(text, str)]
    if texts:
        return texts[0]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return allowed(arguments[0])
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(allowed(option) for option in arguments))
    if origin in (list, tuple):
        length = "" if origin is list or arguments[-1] is ... else f"{len(arguments)}: "
        return f"a list of {length}{allowed(arguments[0])}" + (" each" if length else "")
    if origin is dict:
        return f"a mapping from names to {allowed(arguments[1])}"
    if section := section_in(annotation):
        return "keys: " + ", ".join(section.model_fields)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    return words.get(annotation, str(annotation))


def nearest(name: Any, known: Sequence[str]) -> str:
    """A hint for an unknown name: the known one that is most like it, or all of them."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"


def translate(error: ErrorDetails) -> tuple[str, str]:
    """pydantic's error as a dotted key and what was expected and found there.

    Its location can go deeper than a key: for `training.max_steps: x` it is `("training", "max_steps", "int")`.
    """
    section: type[BaseModel] | None = Recipe
    key, expected = "", allowed(Recipe)
    for part in map(str, error["loc"]):
        if section is None:
            break
        key = f"{key}.{part}".removeprefix(".")
        if part.isdigit():  # of a list of sections
            continue
        if part not in section.model_fields:
            return key, f"unknown key, {nearest(part, list(section.model_fields))}"
        field = section.model_fields[part]
        is_list = typing.get_origin(field.annotation) is tuple
        section = section_in(typing.get_args(field.annotation)[0] if is_list else field.annotation)
        expected = allowed(field.annotation, field.metadata)
    if error["type"] == "missing":
        return key, f"missing, expected {expected}"
    return key or "recipe", f"expected {expected}, got {error['input']!r}"
