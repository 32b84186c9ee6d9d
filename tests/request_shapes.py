"""Requests to SGLang's HTTP entrances, made from the OpenAPI description that it publishes; the same for a seed.

Each is one that a server answers, with up to four fields changed: to values that the description allows (schemathesis
makes them), to extremes of every number, to values of other types, or to fields that nobody knows.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from sglang.srt.sampling.sampling_params import SamplingParams

GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
PATHS = (GENERATE, COMPLETIONS, CHAT)
MAX_NEW_TOKENS = 8
# Of the model: a prompt of LONG tokens runs sparse.
VOCAB_SIZE, CONTEXT, LONG = 49152, 8192, 700
_LIMITS = {GENERATE: ("max_new_tokens",), COMPLETIONS: ("max_tokens",), CHAT: ("max_tokens", "max_completion_tokens")}
_BOOTSTRAP = ("bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key")
_WHOLE = [0, -1, 1, 2, 7, 127, 128, 129, 2**15, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63)]
_FRACTIONS = [0.0, -0.0, 0.5, 1e-300, 1e-7, 1.5, 1e7, 1e38, 1e39, 1e300, -1e300]
_NUMBERS = st.sampled_from([*_WHOLE, *_FRACTIONS, 10**30, VOCAB_SIZE - 1, VOCAB_SIZE, CONTEXT])
_LONG_TEXTS = ["x" * 70_000, "(" * 5000, "\ud83d\ude00" * 9]
_SPECIAL_TEXTS = [
    "(a+)+$",
    "[",
    "{}",
    '{"type":"object"}',
    "[0-9]{3}",
    "<|im_end|>",
    "../../etc/passwd",
    "%s%n",
    "null",
]
_INTERNAL_TEXTS = ["HEALTH_CHECK_1", "ipc:///tmp/fuzz", "2.2.2.2"]
_TEXTS = st.sampled_from(["", " ", "a", "\0", *_LONG_TEXTS, *_SPECIAL_TEXTS, *_INTERNAL_TEXTS])
_SCALARS = st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS)
_ANYTHING = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(["a", "type", "5"]), inner)),
    max_leaves=6,
)
_TOKEN = st.integers(0, VOCAB_SIZE - 1)
_TOKENS = st.builds(
    lambda first, step, length: [(first + i * step) % VOCAB_SIZE for i in range(length)],
    _TOKEN,
    st.integers(0, 99),
    st.sampled_from([1, 2, 3, 30, 64, LONG, CONTEXT - 1, CONTEXT, CONTEXT + 9]),
)


@dataclass(frozen=True)
class Shape:
    """A request: the entrance's path, its body, and when the client goes away (None: it waits for the answer)."""

    path: str
    body: Any
    leaves_after_s: float | None


class Shapes:
    """`description`: the server's /openapi.json."""

    def __init__(self, description: dict[str, Any]) -> None:
        self._components = description["components"]
        self._fields = {path: self._fields_of(description["paths"][path]) for path in PATHS}

    def _fields_of(self, operations: dict[str, Any]) -> dict[str, Any]:
        schema = operations["post"]["requestBody"]["content"]["application/json"]["schema"]
        while "$ref" in schema:
            schema = self._components["schemas"][schema["$ref"].rpartition("/")[2]]
        return dict(schema["properties"])

    def make(self, number: int, how_many: int) -> list[Shape]:
        """Those of seed `number`."""
        made: list[Shape] = []

        @seed(number)
        @settings(
            max_examples=how_many,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
        )
        @given(self._shapes())
        def collect(shape: Shape) -> None:
            made.append(shape)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            collect()
        return made

    @cache  # noqa: B019 - there is one for a run
    def _shapes(self) -> st.SearchStrategy[Shape]:
        leaving = st.sampled_from([None] * 8 + [0.01, 0.3])
        return st.sampled_from(PATHS).flatmap(lambda path: st.builds(Shape, st.just(path), self._bodies(path), leaving))

    @cache  # noqa: B019
    def _bodies(self, path: str) -> st.SearchStrategy[Any]:
        names = st.sampled_from(sorted({*self._fields[path], "unknown_field"} - set(_BOOTSTRAP)))
        changes = st.lists(names.flatmap(lambda name: st.tuples(st.just(name), self._values(path, name))), max_size=4)
        bodies = st.builds(_changed, st.just(path), _honest(path), changes, _sampling_changes())
        return st.integers(0, 30).flatmap(lambda number: bodies if number else _ANYTHING)

    @cache  # noqa: B019
    def _values(self, path: str, name: str) -> st.SearchStrategy[Any]:
        others = st.one_of(_NUMBERS, _ANYTHING)
        if name not in self._fields[path]:
            return others
        return st.one_of(self._allowed(path, name), others)

    def _allowed(self, path: str, name: str) -> st.SearchStrategy[Any]:
        """What the description allows of one field: schemathesis makes whole requests, so it is made one of its own."""
        body = {"type": "object", "required": [name], "properties": {name: self._fields[path][name]}}
        operation = {
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
            "responses": {"200": {"description": "any"}},
        }
        document = {
            "openapi": "3.1.0",
            "info": {"title": name, "version": "1"},
            "paths": {"/": {"post": operation}},
            "components": self._components,
        }
        cases = schemathesis.openapi.from_dict(document)["/"]["POST"]
        return cases.as_strategy(generation_mode=GenerationMode.POSITIVE).map(lambda case: case.body.get(name))


def _honest(path: str) -> st.SearchStrategy[dict[str, Any]]:
    """What a server answers, but for prompts that are too long."""
    sampling = st.fixed_dictionaries({}, optional={"temperature": st.sampled_from([0, 0.7, 1.0])})
    if path == GENERATE:
        return st.builds(lambda ids, params: {"input_ids": ids, "sampling_params": params}, _TOKENS, sampling)
    if path == COMPLETIONS:
        prompts = st.one_of(_TEXTS, _TOKENS, st.just(["one", "two"]))
        return st.builds(lambda prompt, params: {"model": "any", "prompt": prompt} | params, prompts, sampling)
    messages = st.lists(st.builds(lambda text: {"role": "user", "content": text}, _TEXTS), min_size=1, max_size=3)
    return st.builds(lambda said, params: {"model": "any", "messages": said} | params, messages, sampling)


def _sampling_changes() -> st.SearchStrategy[dict[str, Any]]:
    names = sorted({*SamplingParams.__struct_fields__, "unknown_parameter"})
    values = st.one_of(_SCALARS, st.lists(_NUMBERS, max_size=3), st.dictionaries(_TEXTS, _NUMBERS, max_size=3))
    return st.one_of(st.just({}), st.dictionaries(st.sampled_from(names), values, max_size=3))


def _changed(path: str, body: dict[str, Any], changes: list[tuple[str, Any]], sampling: dict[str, Any]) -> Any:
    """With at most MAX_NEW_TOKENS, wherever that can be said."""
    body = body | dict(changes)
    if path == GENERATE and isinstance(body.get("sampling_params"), dict):
        body["sampling_params"] = body["sampling_params"] | sampling
    elif path != GENERATE:
        body |= sampling
    for part in _parts_with_limits(path, body):
        for name in _LIMITS[path]:
            if name not in part or (_is_number(part[name]) and part[name] > MAX_NEW_TOKENS) or part[name] is None:
                part[name] = MAX_NEW_TOKENS
    return body


def _parts_with_limits(path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    if path != GENERATE:
        return [body]
    if not body.get("sampling_params"):
        body["sampling_params"] = {}
    given = body["sampling_params"]
    return [part for part in (given if isinstance(given, list) else [given]) if isinstance(part, dict)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
