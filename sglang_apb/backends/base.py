"""What a prefill method must be able to do. One method, one file; `patches/` call it and know nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Wish:
    """What one request wants of the method, besides the server's settings."""

    question_tokens: int | None = None


class PrefillBackend(ABC):
    """A method bound to one rank's model. All ranks decide alike: decisions use the request's data alone."""

    @abstractmethod
    def plan(self, num_tokens: int, wish: Wish) -> Any:
        """The split of a prompt of `num_tokens`. Raises layout.LayoutError when it cannot be split."""

    @abstractmethod
    def prefill(self, forward_batch: Any, plan: Any) -> Any:
        """Runs the model over the one request of `forward_batch` and writes its KV.

        Returns SGLang's LogitsProcessorOutput for the prompt's last token, the same on all ranks.
        """

    @abstractmethod
    def report(self, plan: Any) -> dict[str, Any]:
        """What ran, for the answer's metadata: method, num_ranks, num_blocks, attention_share, ..."""

    @abstractmethod
    def owned_pages(self, plan: Any) -> list[tuple[int, int]]:
        """The request's pages whose KV this rank holds after `prefill`, as half-open ranges."""
