"""Memory that a sparse prompt's rows take while a layer runs, beside its KV."""

from __future__ import annotations

from dataclasses import dataclass

# Freed memory lies in pieces that do not fit what is asked for next; and results of single blocks come on top.
_ALLOWANCE = 1.15


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
