"""Which rows of a rank's keys may be handed on, and how many each block does: made once a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from sglang_apb.layout import Span


@dataclass(frozen=True)
class Candidates:
    """The candidates of all blocks of one rank, in the blocks' order.

    `table` is what the kernels read, int32 [num_blocks, 4] on the keys' device: first row, number of rows, number
    of passing rows, number of passing rows of the blocks before. The rest is the same on the host, so that no
    shape has to be fetched from the device.
    """

    spans: tuple[Span, ...]  # rows of the layer's keys
    num_passing: tuple[int, ...]
    table: torch.Tensor

    @classmethod
    def of(cls, spans: Sequence[Span], num_passing: Sequence[int], device: torch.device | str) -> Candidates:
        """A block with fewer candidates than `num_passing` hands all of them on."""
        counts = tuple(min(wanted, len(span)) for span, wanted in zip(spans, num_passing, strict=True))
        entries = [
            (span.start, len(span), count, sum(counts[:block]))
            for block, (span, count) in enumerate(zip(spans, counts, strict=True))
        ]
        table = torch.tensor(entries, dtype=torch.int32, device=device).view(len(counts), 4)
        return cls(tuple(spans), counts, table)

    def scores_of(self, rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Of selected rows: float32 [num_selected, num_kv_heads].

        rows: as `select.select_reference` gives them, of scores [num_blocks, num_kv_heads, max_length].
        """
        block = self.block_of_selected[:, None]
        place = rows - self.table[:, 0][block]
        head = torch.arange(scores.shape[1], device=scores.device)
        return scores[block, head, place]

    @cached_property
    def block_of_selected(self) -> torch.Tensor:
        """int64 [num_selected]; made when it is first asked for, by a copy to the device."""
        blocks = [block for block, count in enumerate(self.num_passing) for _ in range(count)]
        return torch.tensor(blocks, dtype=torch.int64, device=self.table.device)

    @property
    def max_length(self) -> int:
        """Candidates of the longest block."""
        return max((len(span) for span in self.spans), default=0)

    @property
    def num_selected(self) -> int:
        """Passing rows, per KV head, of all blocks together."""
        return sum(self.num_passing)
