"""Request bodies to structs, strictly; every wrong field is named, not only the first."""

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final, Literal, TypeVar, get_args, get_origin

import msgspec
from msgspec import Struct

from domain.errors import FieldProblem, InvalidInput, invalid

T = TypeVar("T", bound=Struct)

MAX_PROBLEMS: Final = 100
"""Of the wrong fields of one body, the first ones are named."""

_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_PATH: Final = re.compile(r" - at (?P<key>`key` in )?`\$?(?P<path>[^`]*)`$")

_IN_OBJECT: Final = re.compile(r" - at (`key` in )?`\$(\[\.\.\.\])?[^`]*`$")


def decode(body: bytes, type_: type[T]) -> T:
    """Decode a JSON body.

    Raises:
        InvalidInput: names what is wrong, missing or unknown: all of it, up to ``MAX_PROBLEMS``.
    """
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        hint = " (a lone surrogate is not Unicode text)" if _SURROGATE.search(body) else ""
        raise invalid("body", f"must be JSON in UTF-8: {error}{hint}") from error
    except RecursionError as error:
        raise invalid("body", "is nested too deeply") from error
    try:
        return msgspec.convert(raw, type_, str_keys=True)
    except msgspec.ValidationError as error:
        problems = tuple(islice(_problems(raw, type_, ""), MAX_PROBLEMS))
        raise InvalidInput(*problems or (field_problem("body", error),)) from error


def field_problem(field: str, error: msgspec.ValidationError, type_: Any = None) -> FieldProblem:
    """What msgspec found wrong with a field of a type, in our words."""
    message = str(error)
    match = _PATH.search(message)
    path = match["path"] if match else ""
    text = message[: match.start()] if match else message
    if match and match["key"]:
        text = f"its key: {text[:1].lower()}{text[1:]}"
    if text.startswith("Invalid enum value"):
        text += f", allowed are {', '.join(map(str, _choices(type_)))}"
    path = path.removeprefix("[...]")  # which one it is says the field
    return FieldProblem((field + path).lstrip("."), text[:1].lower() + text[1:])


def _problems(raw: Any, type_: type[Struct], path: str) -> Iterator[FieldProblem]:
    if not isinstance(raw, dict):
        yield FieldProblem(path.rstrip(".") or "body", "expected an object")
        return
    fields = {field.encode_name: field for field in msgspec.structs.fields(type_)}
    for name in (name for name in raw if name not in fields):
        yield FieldProblem(path + name, f"is not a field here; fields are {', '.join(fields)}")
    for name, field in fields.items():
        if name not in raw:
            if field.required:
                yield FieldProblem(path + name, "is required")
            continue
        try:
            msgspec.convert(raw[name], field.type, str_keys=True)
        except msgspec.ValidationError as error:
            yield from _field_problems(raw[name], field.type, path + name, error)


def _field_problems(
    raw: Any, annotation: Any, name: str, error: msgspec.ValidationError
) -> Iterator[FieldProblem]:
    """What is wrong with one field: with every member of an object."""
    inner = _struct_of(annotation)
    if inner is not None and isinstance(raw, dict):
        yield from _problems(raw, inner, f"{name}.")
    elif isinstance(raw, dict) and _IN_OBJECT.search(str(error)):
        for key, value in raw.items():
            try:
                msgspec.convert({key: value}, annotation, str_keys=True)
            except msgspec.ValidationError as wrong:
                yield field_problem(f"{name}.{key}", wrong, annotation)
    else:
        yield field_problem(name, error, annotation)


def _choices(annotation: Any) -> Iterator[Any]:
    """The values of every ``Literal`` in a field's type."""
    for inner in get_args(annotation):
        if get_origin(annotation) is Literal:
            yield inner
        else:
            yield from _choices(inner)


def _struct_of(annotation: Any) -> type[Struct] | None:
    """The one struct in a field's type, if there is one."""
    options = getattr(annotation, "__args__", (annotation,))
    structs = [o for o in options if isinstance(o, type) and issubclass(o, Struct)]
    return structs[0] if len(structs) == 1 else None
