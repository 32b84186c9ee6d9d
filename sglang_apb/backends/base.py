"""What a prefill method must be able to do. One method, one file; `patches/` call it and know nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_apb.attention.base import Build
from sglang_apb.backends.handed_on import HandedOn
from sglang_apb.own_slots import OwnSlots
from sglang_apb.rounds import Rounds

# SGLang's slot for padding, which no request owns: what is written there is not kept.
PADDING_SLOT = 0


@dataclass(frozen=True)
class Wish:
    """What one request wants of the method, besides the server's settings."""

    question_tokens: int | None = None


class PrefillBackend(ABC):
    """A method bound to one rank's model. All ranks decide alike: decisions use the request's data alone."""

    @abstractmethod
    def plan(self, num_tokens: int, wish: Wish, num_cached: int = 0, round_end: int | None = None) -> Any:
        """The split of a prompt of `num_tokens`, of whose context the first `num_cached` are in the KV cache, and which
        is computed up to `round_end` (None: to its end). Raises layout.LayoutError when it cannot be split.
        """

    @abstractmethod
    def rounds(self, plan: Any) -> Rounds | None:
        """Where the prompt may be cut, for others to run in between; None when it runs in one piece."""

    @property
    @abstractmethod
    def context_name(self) -> str | None:
        """What a context token's K and V depend on beside the tokens before it; None where they depend on what follows
        it, too, and so cannot be found again.
        """

    @abstractmethod
    def activation_bytes(self, plan: Any) -> int:
        """Memory that the prompt takes beside its KV, on the rank with most of it."""

    @staticmethod
    @abstractmethod
    def activations(
        model_config: Any, config: Any, num_ranks: int, page_size: int, replicate_kv: bool
    ) -> Callable[[int], int]:
        """The same, of a prompt of so many tokens, before there is a pool: of SGLang's ModelConfig and the method's own
        configuration. `replicate_kv`: each rank ends up with all of a prompt's KV.
        """

    @abstractmethod
    def builds(self) -> Sequence[Build]:
        """What compiles and allocates what would keep a request waiting. All ranks of a GPU server run it once, in
        order.
        """

    @abstractmethod
    def prepare(
        self, forward_batch: Any, plan: Any, on_layer: Callable[[int], None], handed_on: HandedOn
    ) -> Callable[[], Any]:
        """What is done of a prefill before ranks wait for each other; the result does the rest, on all ranks or none.

        It runs the model over the one request of `forward_batch` and writes its KV. `on_layer` is called with each
        layer's number in turn, once the kernels that write its KV are under way. `handed_on` is the request's, from
        round to round. It returns SGLang's LogitsProcessorOutput for the prompt's last token, the same on all ranks;
        None from a round before the last.
        """

    @abstractmethod
    def report(self, plan: Any) -> dict[str, Any]:
        """What ran, for the answer's metadata: method, num_ranks, num_blocks, attention_share, ..."""

    @abstractmethod
    def owned_pages(self, plan: Any) -> list[tuple[int, int]]:
        """The request's pages whose KV this rank holds after `prefill`, as half-open ranges."""

    @property
    @abstractmethod
    def keeps_parts(self) -> bool:
        """Whether a rank keeps the KV of its own part of a prompt only."""

    @abstractmethod
    def own_slots(self, plan: Any) -> OwnSlots | None:
        """The prompt's slots where a rank keeps its own part; None where it keeps every token."""
