"""Every option of the APB prefill backend, once: its default, its meaning, its check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_apb import settings
from sglang_apb.selection.table import SELECTORS
from sglang_apb.settings import ConfigError, check_choice, check_int, setting

OPTION = "--prefill-backend-config"
ALL = "all"
ANCHOR_MODES = ("shared", "recomputed")
ORDERS = ("one_pass", "two_pass")
ENGINES = ("torch", "flashinfer")
DEFAULT_MAX_PASSING = 16384
DEFAULT_QUESTION_TOKENS = 256
DEFAULT_MIN_TOKENS = 2048
# Alone on a GPU, exact attention is as fast up to here: its share of a short prompt's work is small.
DEFAULT_MIN_TOKENS_ONE_GPU = 12288
# Settings with a name, which `--prefill-backend-config` takes in place of JSON.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        **{"block": None, "anchor": None, "passing": None},
        **{"selector": "query", "anchor_mode": "recomputed", "order": "two_pass"},
    },
}


@dataclass(frozen=True)
class ApbConfig:
    """Lengths in tokens. Those of the preset `paper` are None: they follow the prompt's (layout.py)."""

    block: int | None = setting(1024, "tokens of one block; borders stand at its multiples, whatever follows")
    anchor: int | None = setting(512, "tokens at the prompt's start that every block sees")
    passing: int | str | None = setting(
        128, 'tokens each block hands on, per KV head, or "all", which is exact attention'
    )
    max_passing: int | None = setting(
        None,
        "tokens that all blocks together hand on at most, per KV head: at every 16th block's start the best by score "
        f"of those before it stay; {DEFAULT_MAX_PASSING} if left out",
    )
    question_tokens: int | None = setting(
        None, "trailing tokens that attend to everything; the last 256, or a quarter of the prompt if less"
    )
    min_tokens: int | None = setting(
        None,
        f"shorter prompts run as exact attention; if left out {DEFAULT_MIN_TOKENS}, {DEFAULT_MIN_TOKENS_ONE_GPU} on "
        "one GPU, where exact attention is as fast below",
    )
    round_tokens: int = setting(
        16384,
        "tokens that each rank computes of a long prompt before others get a turn; whole blocks, at least one",
    )
    between_rounds: int = setting(
        8192, "tokens of other prompts, each in one piece, between two rounds of a long one; 0: they wait for its end"
    )
    selector: str = setting(
        "key_diff",
        "how passing tokens are chosen: key_diff, those whose keys are least like their block's, or the paper's query, "
        "those that the question attends to most",
    )
    anchor_mode: str = setting(
        "shared", "shared: send the anchor's KV; recomputed: the paper's anchor, with the question inserted"
    )
    order: str = setting("one_pass", "one_pass: the question rides along; two_pass: the paper's order, context first")
    engine: str | None = setting(
        None, "what computes: flashinfer with Triton kernels, on CUDA, or torch; the faster that can if left out"
    )

    def __post_init__(self) -> None:
        for name in ("anchor", "question_tokens", "min_tokens", "between_rounds"):
            check_int(name, getattr(self, name), minimum=0 if name != "question_tokens" else 1)
        for name in ("block", "max_passing", "round_tokens"):
            check_int(name, getattr(self, name), minimum=1)
        if self.passing != ALL:
            check_int("passing", self.passing, minimum=0, also=f'"{ALL}"')
        check_choice("selector", self.selector, SELECTORS)
        check_choice("anchor_mode", self.anchor_mode, ANCHOR_MODES)
        check_choice("order", self.order, ORDERS)
        if self.engine is not None:
            check_choice("engine", self.engine, ENGINES)
        if self.passing == ALL and self.max_passing is not None:
            raise ConfigError(f'passing="all" hands everything on, max_passing={self.max_passing} not: leave one out')
        if self.order == "two_pass" and self.anchor_mode == "shared":
            raise ConfigError(
                'order="two_pass" is the paper\'s, whose anchor holds the question: add anchor_mode="recomputed", or '
                'use order="one_pass"'
            )

    @property
    def is_steered_by_question(self) -> bool:
        """Whether a context token's K and V depend on what follows it, too."""
        return self.selector != "key_diff" or self.anchor_mode == "recomputed"

    @property
    def bound(self) -> int | None:
        """`max_passing` in force; None where everything handed on stays."""
        if self.passing in (ALL, None):
            return None
        return DEFAULT_MAX_PASSING if self.max_passing is None else self.max_passing

    def shortest_sparse(self, device: str, num_ranks: int) -> int:
        """Tokens of the shortest prompt that runs sparse; device: SGLang's `--device`."""
        if self.min_tokens is not None:
            return self.min_tokens
        return DEFAULT_MIN_TOKENS_ONE_GPU if device == "cuda" and num_ranks == 1 else DEFAULT_MIN_TOKENS


def parse(text: str | None) -> ApbConfig:
    """The value of `--prefill-backend-config`: a JSON object, the path of a file that holds one, or a preset's name.

    Raises ConfigError.
    """
    return settings.parse(OPTION, text, ApbConfig, PRESETS)


def from_mapping(values: Mapping[str, Any]) -> ApbConfig:
    """Raises ConfigError when a key is unknown, with the list of known ones."""
    return settings.from_mapping(OPTION, values, ApbConfig)


def describe() -> str:
    """One sentence an option, for `--help`."""
    return settings.describe(ApbConfig)
