"""Keeps a sparse prompt's K and V, layer by layer, in SGLang's pool: of every token, or of what this rank owns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sglang_apb.backends.base import PADDING_SLOT
from sglang_apb.backends.layer_rows import LayerRows, nothing
from sglang_apb.layout import Layout, Span
from sglang_apb.rank_group import RankGroup


@dataclass(frozen=True)
class Part:
    """Rows of a layer that are kept together: `rows` of this rank's. `slots`: of these rows or, where every rank keeps
    all, of `counts[rank]` rows of each rank, padded to the most. `ends_layer`: nothing of the layer is kept after them.
    """

    rows: slice
    slots: torch.Tensor
    counts: Sequence[int]
    ends_layer: bool


class KvCache:
    """Writes one round's K and V, layer by layer, to the slots SGLang gave the prompt.

    slots: of all of its tokens so far. sees_cached: whether the round's rows see own tokens of before.

    The question is every rank's. Ranks that will decode all keep rank 0's rows of it, for the same bits everywhere
    (see ApbBackend._logits).
    """

    def __init__(
        self,
        model_runner: Any,
        slots: torch.Tensor,
        layout: Layout,
        group: RankGroup,
        replicate: bool,
        sees_cached: bool,
        on_layer: Callable[[int], None],
    ) -> None:
        self._on_layer = on_layer
        self.pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        self._group = group
        self._rows = layout.rows_of(group.rank)
        self.gathers = replicate
        by_rank = [layout.rows_of(rank).block_tokens.values() for rank in range(layout.num_ranks)]
        self._context_slots = [slots[indices(spans, slots.device)] for spans in by_rank]
        self._cached_slots = slots[indices(layout.cached_on(group.rank) if sees_cached else (), slots.device)]
        self._question_slots = slots[self._rows.question_tokens.start : self._rows.question_tokens.end]

    @cached_property
    def context(self) -> Part:
        span = self._rows.context
        return self._part(slice(span.start, span.end), self._context_slots, ends_layer=False)

    @cached_property
    def question(self) -> Part:
        return self._part(slice(-len(self._question_slots), None), self._slots_of_question(), ends_layer=True)

    @cached_property
    def context_and_question(self) -> Part:
        pairs = zip(self._context_slots, self._slots_of_question(), strict=True)
        return self._part(slice(self._rows.context.start, None), [torch.cat(pair) for pair in pairs], ends_layer=True)

    def _slots_of_question(self) -> list[torch.Tensor]:
        """Of each rank's rows of it: one rank's are kept, rank 0's or this one's."""
        kept, elsewhere = self._question_slots, torch.full_like(self._question_slots, PADDING_SLOT)
        kept_rank = 0 if self.gathers else self._group.rank
        return [kept if rank == kept_rank else elsewhere for rank in range(self._group.size)]

    def _part(self, rows: slice, by_rank: Sequence[torch.Tensor], *, ends_layer: bool) -> Part:
        counts = [len(slots) for slots in by_rank]
        slots = by_rank[self._group.rank]
        if self.gathers:
            slots = torch.cat([_padded(part, max(counts)) for part in by_rank])
        return Part(rows, slots, counts, ends_layer)

    def own_context(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cached K and V of this rank's blocks, [num_rows, num_kv_heads, head_dim] each."""
        slots = self._context_slots[self._group.rank]
        return self.pool.get_key_buffer(layer_id)[slots], self.pool.get_value_buffer(layer_id)[slots]

    def with_cached(self, layer_id: int, rows: LayerRows) -> LayerRows:
        """The rows with K and V of this rank's cached tokens in front of theirs."""
        if len(self._cached_slots) == 0:
            return rows
        k, v = self.pool.get_key_buffer(layer_id), self.pool.get_value_buffer(layer_id)
        return LayerRows(rows.q, self._behind_cached(k, rows.k), self._behind_cached(v, rows.v), rows.scale)

    def _behind_cached(self, buffer: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        num_cached = len(self._cached_slots)
        both = rows.new_empty((num_cached + len(rows), *rows.shape[1:]))
        if buffer.dtype == rows.dtype:
            torch.index_select(buffer, 0, self._cached_slots, out=both[:num_cached])
        else:  # `--kv-cache-dtype`
            both[:num_cached] = buffer[self._cached_slots]
        both[num_cached:] = rows
        return both

    def start(self, part: Part, layer: Any, k: torch.Tensor, v: torch.Tensor) -> Callable[[], None]:
        """Starts keeping `part` of the rows k and v; the result finishes it."""
        k, v = k[part.rows], v[part.rows]
        if not self.gathers:
            self._write(part, layer, k, v)
            return nothing
        pending = self._group.gather_together((k, v), part.counts)
        return lambda: self._write(part, layer, *(rows.flatten(0, 1) for rows in pending.wait()))

    def _write(self, part: Part, layer: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        self.pool.set_kv_buffer(layer, part.slots, k, v)
        if part.ends_layer:
            self._on_layer(layer.layer_id)


def _padded(slots: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat((slots, slots.new_full((length - len(slots),), PADDING_SLOT)))


def indices(spans: Iterable[Span], device: torch.device) -> torch.Tensor:
    """The numbers in `spans`, one after the other, int64."""
    parts = [torch.arange(span.start, span.end, device=device) for span in spans]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)
