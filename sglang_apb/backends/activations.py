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
    item_bytes: int

    @classmethod
    def of(cls, model_config: object) -> RowSizes:
        """model_config: SGLang's ModelConfig."""
        config: object = model_config
        return cls(
            hidden=config.hidden_size,  # type: ignore[attr-defined]
            q=config.num_attention_heads * config.head_dim,  # type: ignore[attr-defined]
            kv=2 * config.num_key_value_heads * config.head_dim,  # type: ignore[attr-defined]
            item_bytes=config.dtype.itemsize,  # type: ignore[attr-defined]
        )

    def bytes_per_row(self, num_ranks_gathered: int = 0) -> int:
        """At the layer's peak: its input and residual, Q, K and V, and attention's result with either the layer's
        output or K and V of the own rows in one piece and of all ranks' (`num_ranks_gathered`; 0 where none are).
        """
        gathered = (1 + num_ranks_gathered) * self.kv if num_ranks_gathered else 0
        numbers = 2 * self.hidden + self.q + self.kv + self.q + max(self.hidden, gathered)
        return int(_ALLOWANCE * self.item_bytes * numbers)

    def kv_bytes_per_token(self, num_layers: int) -> int:
        return self.kv * self.item_bytes * num_layers
