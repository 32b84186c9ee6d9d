"""Every option of the APB prefill backend, once: its default, its meaning, its check."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_apb.selection import SELECTORS

ALL = "all"
ANCHOR_MODES = ("shared", "recomputed")
BALANCES = ("zigzag", "contiguous")
ORDERS = ("one_pass", "two_pass")
ENGINES = ("torch", "flashinfer")
DEFAULT_NUM_BLOCKS = 16
# A short prompt gets fewer blocks than that: what a block hands on must be little beside what it holds.
MIN_DEFAULT_BLOCK = 512
DEFAULT_QUESTION_TOKENS = 256
# Lengths that follow the prompt are multiples of this, so that they suit attention kernels' tiles.
LENGTH_STEP = 128
# Settings with a name, which `--prefill-backend-config` takes in place of JSON.
PRESETS: dict[str, dict[str, Any]] = {
    # From 128K tokens on, blocks hand on no more than they do there: work grows little faster than the prompt.
    "long": {"max_passing": 16384},
}


class ConfigError(ValueError):
    """An option is unknown or has a value that cannot work; the text names the value and the remedy."""


def option(default: Any, text: str) -> Any:
    """A field of a frozen dataclass with the sentence that `--help` and the README show for it."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ApbConfig:
    """Lengths in tokens. None follows the prompt's length n."""

    anchor: int | None = option(None, "tokens at the prompt's start that every block sees; n/64 if left out")
    passing: int | str | None = option(None, 'tokens each block hands on, per KV head, or "all"; n/128 if left out')
    max_passing: int | None = option(None, "tokens that all blocks together hand on at most, per KV head")
    block: int | None = option(None, "tokens of one block, instead of num_blocks")
    num_blocks: int | None = option(
        None, "number of blocks, whatever the number of ranks; 16 if left out, of at least 512 tokens"
    )
    question_tokens: int | None = option(
        None, "trailing tokens that attend to everything; the last 256, or a quarter of the prompt if less"
    )
    min_tokens: int = option(2048, "shorter prompts run as exact attention")
    selector: str = option("query", f"how passing tokens are chosen: {', '.join(SELECTORS)}")
    anchor_mode: str = option(
        "shared", "shared: send the anchor's KV; recomputed: the paper's anchor, with the question inserted"
    )
    balance: str = option("zigzag", "which rank owns which block: zigzag evens out the work, or contiguous")
    order: str = option("one_pass", "one_pass: the question rides along; two_pass: the paper's order, context first")
    engine: str = option("torch", "what computes: torch, on any device, or flashinfer with Triton kernels, on CUDA")

    def __post_init__(self) -> None:
        for name in ("anchor", "question_tokens", "min_tokens"):
            _check_int(name, getattr(self, name), minimum=0 if name != "question_tokens" else 1)
        for name in ("block", "num_blocks", "max_passing"):
            _check_int(name, getattr(self, name), minimum=1)
        if self.passing != ALL:
            _check_int("passing", self.passing, minimum=0, also=f'"{ALL}"')
        _check_choice("selector", self.selector, SELECTORS)
        _check_choice("anchor_mode", self.anchor_mode, ANCHOR_MODES)
        _check_choice("balance", self.balance, BALANCES)
        _check_choice("order", self.order, ORDERS)
        _check_choice("engine", self.engine, ENGINES)
        if self.block is not None and self.num_blocks is not None:
            raise ConfigError(
                f"block={self.block} and num_blocks={self.num_blocks} say the same thing twice: give one of them"
            )
        if self.passing == ALL and self.max_passing is not None:
            raise ConfigError(f'passing="all" hands everything on, max_passing={self.max_passing} not: leave one out')
        if self.order == "two_pass" and self.anchor_mode == "shared":
            raise ConfigError(
                'order="two_pass" runs the context before the question, so passing tokens can only be chosen by a '
                'question inside the anchor: add anchor_mode="recomputed", or use order="one_pass"'
            )


def parse(text: str | None) -> ApbConfig:
    """The value of `--prefill-backend-config`: a JSON object, the path of a file that holds one, or a preset's name.

    Raises ConfigError.
    """
    if text is None or not text.strip():
        return ApbConfig()
    if text in PRESETS:
        return from_mapping(PRESETS[text])
    source = text if text.lstrip().startswith("{") else _read(text)
    try:
        values = json.loads(source)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--prefill-backend-config is not valid JSON: {error}. Got: {_shorten(source)}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f'--prefill-backend-config must be a JSON object such as {{"num_blocks": 16}}, not {_shorten(source)}'
        )
    return from_mapping(values)


def from_mapping(values: Mapping[str, Any]) -> ApbConfig:
    """Raises ConfigError when a key is unknown, with the list of known ones."""
    known = [field.name for field in dataclasses.fields(ApbConfig)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r} of --prefill-backend-config; known: {', '.join(known)}")
    return ApbConfig(**values)


def describe() -> str:
    """One sentence an option, for `--help`."""
    return "; ".join(f"{field.name}: {field.metadata['help']}" for field in dataclasses.fields(ApbConfig))


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text()
    except OSError as error:
        raise ConfigError(
            f"--prefill-backend-config {path!r} is neither a JSON object, nor a preset ({', '.join(PRESETS)}), nor a "
            f"readable file ({error.strerror})"
        ) from error


def _check_int(name: str, value: Any, *, minimum: int, also: str = "") -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        wanted = f"a whole number of at least {minimum}" + (f" or {also}" if also else "")
        raise ConfigError(f"{name} must be {wanted}, not {value!r}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
