"""What the sequence-parallel ranks say to each other: gloo on CPUs, NCCL on GPUs, nothing at all on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

# The widest type there is: 16 bytes.
_WIDE = torch.complex128


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

    def gather_padded(self, rows: torch.Tensor, counts: Sequence[int]) -> Pending:
        """Starts collecting every rank's rows: [num_ranks, max(counts), ...]; rows past a rank's count are 0.

        rows: [counts[self.rank], ...]. `counts` is the same on all ranks.
        """
        gathered = self.gather_together((rows,), counts)
        return Pending(gathered.result[0], gathered.works)

    def gather_together(self, parts: Sequence[torch.Tensor], counts: Sequence[int]) -> Pending:
        """The same for several tensors with as many rows: a list.

        Both backends gather equal shapes only.
        """
        if any(len(rows) != counts[self.rank] for rows in parts):
            raise ValueError(f"rank {self.rank} announced {counts[self.rank]} rows and has {len(parts[0])}")
        most = max(counts)
        if self._group is None or most == 0:
            return Pending([rows.expand(self.size, *rows.shape) for rows in parts])
        sent = [_dense(_with_rows(rows, most)) for rows in parts]
        gathered = [rows.new_empty((self.size, *rows.shape)) for rows in sent]
        targets = [rows.flatten(0, 1) for rows in gathered]
        return Pending(gathered, self._gather(targets, sent))

    def _gather(self, targets: list[torch.Tensor], sent: list[torch.Tensor]) -> list[Any]:
        """By one collective, but on gloo, two threads of which write the name of what they have done to one string:
        a name as long as that of a coalesced collective corrupts memory (PyTorch 2.14.1, ProcessGroupGloo::runLoop).
        """
        if len(sent) > 1 and sent[0].is_cuda:
            return [self._group.all_gather_single_coalesced(targets, sent)]  # type: ignore[union-attr]
        return [
            dist.all_gather_single(target, rows, group=self._group, async_op=True)
            for target, rows in zip(targets, sent, strict=True)
        ]

    def broadcast(self, rows: torch.Tensor, source: int) -> Pending:
        """Starts sending `rows` of rank `source` to all; elsewhere `rows` is written over."""
        if self._group is None:
            return Pending(rows)
        sender = dist.get_global_rank(self._group, source)
        return Pending(rows, [dist.broadcast(rows, sender, group=self._group, async_op=True)])


def _with_rows(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """With zeros behind."""
    if len(rows) == num_rows:
        return rows
    return torch.cat((rows, rows.new_zeros((num_rows - len(rows), *rows.shape[1:]))))


def _dense(rows: torch.Tensor) -> torch.Tensor:
    """rows.contiguous(), at the memory's speed: PyTorch's kernel for strided copies moves a number a time, so these
    are made as large as can be.
    """
    if rows.is_contiguous():
        return rows
    step = _WIDE.itemsize // rows.itemsize
    if rows.stride(-1) != 1 or any(n % step for n in (rows.shape[-1], rows.storage_offset(), *rows.stride()[:-1])):
        return rows.contiguous()
    return rows.view(_WIDE).contiguous().view(rows.dtype)
