"""Options that take a JSON object: one frozen dataclass each, whose fields say default, meaning and bounds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting is unknown or has a value that cannot work; the text names the value and the remedy."""


def setting(default: Any, text: str) -> Any:
    """A field of a frozen dataclass with the sentence that `--help` and the README show for it."""
    return dataclasses.field(default=default, metadata={"help": text})


def parse(option: str, text: str | None, kind: type[T], presets: Mapping[str, Mapping[str, Any]]) -> T:
    """The value of `option`: a JSON object, the path of a file that holds one, or a preset's name.

    What is null is left out. Raises ConfigError.
    """
    if text is None or not text.strip():
        return kind()
    if text in presets:
        return from_mapping(option, presets[text], kind)
    source = text if text.lstrip().startswith("{") else _read(option, text, presets)
    try:
        values = json.loads(source)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{option} is not valid JSON: {error}. Got: {_shorten(source)}") from error
    if not isinstance(values, dict):
        example = next(iter(names(kind)))
        raise ConfigError(f'{option} must be a JSON object such as {{"{example}": ...}}, not {_shorten(source)}')
    return from_mapping(option, {key: value for key, value in values.items() if value is not None}, kind)


def from_mapping(option: str, values: Mapping[str, Any], kind: type[T]) -> T:
    """Raises ConfigError when a key is unknown, with the list of known ones."""
    known = names(kind)
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r} of {option}; known: {', '.join(known)}")
    return kind(**values)


def names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def describe(kind: type) -> str:
    """One sentence a setting, for `--help`."""
    return "; ".join(f"{field.name}: {field.metadata['help']}" for field in dataclasses.fields(kind))


def check_int(name: str, value: Any, *, minimum: int, also: str = "") -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        wanted = f"a whole number of at least {minimum}" + (f" or {also}" if also else "")
        raise ConfigError(f"{name} must be {wanted}, not {value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _read(option: str, path: str, presets: Mapping[str, Any]) -> str:
    try:
        return Path(path).expanduser().read_text()
    except OSError as error:
        also = f", nor a preset ({', '.join(presets)})" if presets else ""
        raise ConfigError(
            f"{option} {path!r} is neither a JSON object{also}, nor a readable file ({error.strerror})"
        ) from error


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
