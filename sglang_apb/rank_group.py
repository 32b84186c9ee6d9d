"""What the sequence-parallel ranks say to each other: gloo on CPUs, NCCL on GPUs, nothing at all on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class Pending:
    """A collective under way. `wait` gives its result; on CUDA it orders streams and does not block the host."""

    result: Any
    works: list[Any] = field(default_factory=list)

    def wait(self) -> Any:
        for work in self.works:
            work.wait()
        return self.result


class RankGroup:
    """The ranks of one prompt. `group` None stands for a single rank, for which every call is a no-op.

    Every rank must make the same calls in the same order.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def gather_rows(self, rows: torch.Tensor, counts: Sequence[int]) -> Pending:
        """Starts collecting every rank's rows: a list of [counts[rank], ...], one tensor a rank.

        rows: [counts[self.rank], ...]. `counts` is the same on all ranks. Rows are padded to the largest count,
        since both backends gather equal shapes only.
        """
        if len(rows) != counts[self.rank]:
            raise ValueError(f"rank {self.rank} announced {counts[self.rank]} rows and has {len(rows)}")
        if self._group is None:
            return Pending([rows])
        most = max(counts)
        if most == 0:
            return Pending([rows] * self.size)
        padded = rows.new_zeros((most, *rows.shape[1:]))
        padded[: len(rows)] = rows
        # [num_ranks * most, ...] -> [num_ranks, most, ...]
        gathered = rows.new_empty((self.size * most, *rows.shape[1:]))
        work = dist.all_gather_into_tensor(gathered, padded, group=self._group, async_op=True)
        parts = gathered.view(self.size, most, *rows.shape[1:])
        return Pending([part[:count] for part, count in zip(parts, counts, strict=True)], [work])

    def broadcast(self, rows: torch.Tensor, source: int) -> Pending:
        """Starts sending `rows` of rank `source` to all; elsewhere `rows` is written over."""
        if self._group is None:
            return Pending(rows)
        sender = dist.get_global_rank(self._group, source)
        return Pending(rows, [dist.broadcast(rows, sender, group=self._group, async_op=True)])
