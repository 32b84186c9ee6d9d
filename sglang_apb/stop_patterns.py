"""Which stop patterns keep Python's `re`, which cannot be interrupted, busy for long. The scheduler runs them, at every
token, over the end of an answer.
"""

from __future__ import annotations

import re._constants as sre
import re._parser as parser
from collections.abc import Iterator
from typing import Any

_REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT)
Items = Any  # a parsed pattern: pairs of an operation and what belongs to it

# How much of an answer's end a pattern is tried on. Time grows with its third power for two long repeats.
TAIL_TOKENS = 256
_MAX_LONG_REPEATS = 2
_LONG = 64


def find_fault(pattern: str) -> str:
    """Why trying `pattern` may take too long, as the end of a sentence; empty when it does not.

    One text must not be read in many ways: then time is exponential in the text's length. That may be where within a
    repeat there is another one of varying length, or alternatives that do not begin with different letters.
    Raises re.error when it is no pattern.
    """
    items = parser.parse(pattern)
    if _is_ambiguous(items, is_repeated=False):
        return "repeats what itself repeats, or has alternatives that may begin alike"
    if _num_long_repeats(items) > _MAX_LONG_REPEATS:
        return f"has more than {_MAX_LONG_REPEATS} repeats without an end, or of more than {_LONG} times"
    return ""


def _num_long_repeats(items: Items) -> int:
    """On one way through the pattern."""
    total = 0
    for operation, value in items:
        inner = [_num_long_repeats(part) for part in _parts(operation, value)]
        total += max(inner, default=0) if operation is sre.BRANCH else sum(inner)
        total += operation in _REPEATS and value[1] > _LONG
    return total


def _is_ambiguous(items: Items, is_repeated: bool) -> bool:
    for operation, value in items:
        if operation in _REPEATS:
            least, most, _ = value
            if is_repeated and least != most:
                return True
            is_inner_repeated = is_repeated or most > 1
        else:
            if operation is sre.BRANCH and is_repeated and not _begin_differently(value[1]):
                return True
            is_inner_repeated = is_repeated
        if any(_is_ambiguous(inner, is_inner_repeated) for inner in _parts(operation, value)):
            return True
    return False


def _begin_differently(branches: list[Items]) -> bool:
    first = [branch[0] if len(branch) else None for branch in branches]
    letters = {item[1] for item in first if item is not None and item[0] is sre.LITERAL}
    return len(letters) == len(branches)


def _parts(operation: Any, value: Any) -> Iterator[Items]:
    """Patterns within a repeat, a group, alternatives, look-around or a conditional."""
    if operation in _REPEATS:
        yield value[2]
    elif operation is sre.BRANCH:
        yield from value[1]
    elif operation in (sre.SUBPATTERN, sre.ASSERT, sre.ASSERT_NOT):
        yield value[-1]
    elif operation is sre.ATOMIC_GROUP:
        yield value
    elif operation is sre.GROUPREF_EXISTS:
        yield from (part for part in value[1:] if part is not None)
