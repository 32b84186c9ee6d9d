"""Memory that a sparse prompt takes beside its KV: its rows while a layer runs, and what its rounds hand on."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_apb import layout as layouts
from sglang_apb.backends.sparse_attention import KEYS_A_CALL
from sglang_apb.config import ApbConfig
from sglang_apb.layout import Layout, LayoutError, num_rows
from sglang_apb.rounds import Rounds, rounds_of

# Freed memory lies in pieces that do not fit what is asked for next; and results of single blocks come on top.
_ALLOWANCE = 1.15
# Of a bounded period's keys while its buffer is made: those before, those that stay, the buffer and the last one's.
_BOUNDED_COPIES = 4


@dataclass(frozen=True)
class RowSizes:
    """Of a decoder layer: numbers in one row of each kind of tensor, of `item_bytes` each."""

    hidden: int
    q: int
    kv: int  # of K and V together
    feed_forward: int
    num_q_heads: int
    item_bytes: int

    @classmethod
    def of(cls, model_config: object) -> RowSizes:
        """model_config: SGLang's ModelConfig."""
        config: object = model_config
        return cls(
            hidden=config.hidden_size,  # type: ignore[attr-defined]
            q=config.num_attention_heads * config.head_dim,  # type: ignore[attr-defined]
            kv=2 * config.num_key_value_heads * config.head_dim,  # type: ignore[attr-defined]
            feed_forward=config.hf_text_config.intermediate_size,  # type: ignore[attr-defined]
            num_q_heads=config.num_attention_heads,  # type: ignore[attr-defined]
            item_bytes=config.dtype.itemsize,  # type: ignore[attr-defined]
        )

    def bytes_per_row(self, num_ranks_gathered: int = 0) -> int:
        """At the layer's peak: its input and residual, Q, K and V, and attention's result with either the layer's
        output or K and V of the own rows in one piece and of all ranks' (`num_ranks_gathered`; 0 where none are).
        """
        gathered = (1 + num_ranks_gathered) * self.kv if num_ranks_gathered else 0
        numbers = 2 * self.hidden + self.q + self.kv + self.q + max(self.hidden, gathered)
        return int(_ALLOWANCE * self.item_bytes * numbers)

    def partial_bytes_per_question_row(self, num_ranks: int) -> int:
        """The question's float32 results and log-sum-exps (`sparse_attention.py`): over the context and over itself,
        and on several ranks their sum and those of all ranks.
        """
        num_partials = 2 + (1 + num_ranks if num_ranks > 1 else 0)
        return int(_ALLOWANCE * 4 * num_partials * (self.q + 4 * self.num_q_heads))

    def feed_forward_bytes(self, num_rows: int) -> int:
        """What so many rows take in a feed-forward layer: gate and up, their product, and the result."""
        return num_rows * (3 * self.feed_forward + self.hidden) * self.item_bytes

    def kv_bytes_per_token(self, num_layers: int) -> int:
        return self.kv * self.item_bytes * num_layers


@dataclass(frozen=True)
class Activations:
    """Of a server. `replicate_kv`: each of its ranks ends up with all of a prompt's KV."""

    sizes: RowSizes
    num_layers: int
    config: ApbConfig
    num_ranks: int
    page_size: int
    replicate_kv: bool

    @classmethod
    def of_server(
        cls, model_config: object, config: ApbConfig, num_ranks: int, page_size: int, replicate_kv: bool
    ) -> Activations:
        """model_config: SGLang's ModelConfig."""
        num_layers: int = model_config.num_hidden_layers  # type: ignore[attr-defined]
        return cls(RowSizes.of(model_config), num_layers, config, num_ranks, page_size, replicate_kv)

    @property
    def keeps_parts(self) -> bool:
        return self.num_ranks > 1 and not self.replicate_kv

    def rounds(self, layout: Layout) -> Rounds | None:
        if self.config.is_steered_by_question:
            return None
        return rounds_of(layout, self.config.round_tokens)

    def num_bytes(self, layout: Layout) -> int:
        """Of the prompt, on the rank with most of it."""
        num_own, rounds = layout.most_context_on_a_rank, self.rounds(layout)
        if rounds is None or rounds.end_of(0) is None:
            return self._bytes_of_rows(layout, num_own)
        # The last round, and the first behind a found context, see all own keys.
        of_rows = self._bytes_of_rows(layout, min(num_own, rounds.longest // self.num_ranks))
        return of_rows + (num_own + self._num_exchanged(layout)) * self._key_bytes + self._bytes_of_handed_on(layout)

    def _num_exchanged(self, layout: Layout) -> int:
        """Keys on their way behind a found context, of which all passing tokens are chosen anew: in order, and with
        several ranks the own ones and all ranks' as they come; and those of a call (attention/flashinfer.py).
        """
        num_passing = sum(map(layout.num_passing, range(layout.num_blocks)))
        return (1 if self.num_ranks == 1 else 3) * num_passing + KEYS_A_CALL

    def _bytes_of_handed_on(self, layout: Layout) -> int:
        return layout.most_shared_keys * self._key_bytes * self.num_layers

    def num_bytes_of(self, num_tokens: int) -> int:
        """Of a prompt of so many tokens; 0 when it is too short to be laid out."""
        try:
            layout = layouts.plan(num_tokens, self.config, num_ranks=self.num_ranks, page_size=self.page_size)
        except LayoutError:
            return 0
        return self.num_bytes(layout)

    def _bytes_of_rows(self, layout: Layout, num_own: int) -> int:
        num_question, sizes = len(layout.question), self.sizes
        per_row = sizes.bytes_per_row(self.num_ranks if self.num_ranks > 1 and self.replicate_kv else 0)
        of_rows = (num_rows(layout.anchor_copy) + num_own + num_question) * per_row
        of_question = num_question * sizes.partial_bytes_per_question_row(self.num_ranks)
        return of_rows + of_question + _BOUNDED_COPIES * layout.num_bounded_keys * self._key_bytes

    @property
    def _key_bytes(self) -> int:
        """K and V of one token in one layer."""
        return self.sizes.kv * self.sizes.item_bytes
