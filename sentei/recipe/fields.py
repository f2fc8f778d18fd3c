"""A method's fields: the names that are known, and values from YAML or a command line as the field's type."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union

from sentei import methods

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the known word that is most like this one, or a full stop."""
    near = difflib.get_close_matches(word, list(known), 1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."


def check_keys(given: Iterable[Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            raise ValueError(f"{where} has no key {key!r}{nearest(str(key), known)} Known: {', '.join(known)}")


_WORDS = {
    int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "keys with values",
    list[str]: "a list of texts, such as [a, b]", list[int]: "a list of whole numbers, such as [128, 1024]",
}  # fmt: skip


def check_type(name: str, value: Any, kind: Any) -> None:
    """Refuse a value from YAML that is not of this type: ValueError says what was expected."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)
    if not any(_is(value, kind) for kind in kinds):
        words = [_WORDS.get(kind) or _WORDS.get(typing.get_origin(kind), "a list") for kind in kinds]
        raise ValueError(f"{name} is {value!r}; expected {words[0]}")


def _is(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_is(item, typing.get_args(kind)[0]) for item in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if kind is float else typing.get_origin(kind) or kind)


def method_fields(name: str) -> dict[str, tuple[dataclasses.Field, Any]]:
    """Field name -> (dataclass field, its type) of a method. Imports the method, so torch."""
    kind = methods.load(name)
    hints = typing.get_type_hints(kind)
    return {item.name: (item, hints[item.name]) for item in dataclasses.fields(kind)}


def make_method(name: str, fields: Mapping[str, Any]) -> Any:
    """The method object; values may be text, as from a command line.

    Raises:
        ValueError: no such method or field (names the nearest), a value of another type, or one the method refuses.
    """
    known = method_fields(name)
    for key in fields:
        if key not in known:
            raise ValueError(f"method {name} has no field {key!r}{nearest(key, known)} Its fields: {', '.join(known)}")
    missing = [
        key
        for key, (item, _) in known.items()
        if key not in fields and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"method {name} needs {', '.join(missing)}")
    made = methods.load(name)(**{key: convert(key, value, known[key][1]) for key, value in fields.items()})
    if made.structural:
        made.check()
    return made


def convert(name: str, value: Any, kind: Any) -> Any:
    """A value from YAML or the command line as the field's type. YAML reads 2e-3 as text, and on/off as booleans."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if type(None) in arguments and (value is None or value in ("none", "null", "")):
            return None
        inner = [argument for argument in arguments if argument is not type(None)]
        for argument in inner[:-1]:
            try:
                return convert(name, value, argument)
            except ValueError:
                continue
        return convert(name, value, inner[-1])
    if origin is Literal:
        text = ("off", "on")[value] if isinstance(value, bool) and value not in arguments else value
        if text not in arguments:
            known = [str(argument) for argument in arguments]
            raise ValueError(f"{name} is {text!r}; expected one of {', '.join(known)}{nearest(str(text), known)}")
        return text
    if origin in (tuple, list):
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        return origin(convert(name, item.strip() if isinstance(item, str) else item, arguments[0]) for item in items)
    if kind is bool:
        word = str(value).lower()
        if word not in _TRUE + _FALSE:
            raise ValueError(f"{name} is {value!r}; expected true or false")
        return word in _TRUE
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
            if kind is float or number.is_integer():
                return kind(number)
        except (TypeError, ValueError, OverflowError):
            pass
    if kind in (int, float):
        raise ValueError(f"{name} is {value!r}; expected {'a whole number' if kind is int else 'a number'}")
    if kind is str:
        return ("off", "on")[value] if isinstance(value, bool) else str(value)
    return value
