"""One request on the decode side: which bytes of which rank have arrived, and whether that is all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sglang_apb.transfer.protocol import ownership
from sglang_apb.transfer.protocol.ownership import PageRange
from sglang_apb.transfer.protocol.wire import Announce, Block, Buffer, End, WireError


class TransferError(RuntimeError):
    """The transfer cannot become complete any more; the message says why."""


class Assembly:
    """Counts a request's KV in (part, buffer, page) cells: complete is every cell once, every rank's end, and aux.

    Each rank brings one of the equal parts of a page's heads, `part_of_rank`; item_lens are bytes of such a part of a
    page in each buffer. The ranks of one part share the pages out.

    `rank` is the index of the peer that a frame came from, never a number that the peer claims. Frames that
    contradict what their rank announced raise WireError (the frame is dropped); what can never be repaired
    raises TransferError (the request fails).
    """

    def __init__(self, item_lens: Sequence[int], num_pages: int, part_of_rank: Sequence[int]):
        num_ranks = len(part_of_rank)
        self.num_pages = num_pages
        self.num_bytes = self.num_hidden_bytes = 0
        self.info: dict[str, int | str] = {}
        self.aux: Buffer | None = None  # tensor-parallel ranks all have the same: the first one that comes
        self._aux_rank: int | None = None
        self._item_lens = np.asarray(item_lens, np.int64)
        self._part_of_rank = tuple(part_of_rank)
        self._arrived = np.zeros((max(part_of_rank, default=0) + 1, len(item_lens), num_pages), bool)
        self._ranges: list[tuple[PageRange, ...] | None] = [None] * num_ranks
        self._bytes_of_rank = [0] * num_ranks
        self._ends: dict[int, End] = {}

    @property
    def complete(self) -> bool:
        return len(self._ends) == len(self._ranges) and self.aux is not None

    def announce(self, rank: int, message: Announce) -> None:
        """Raises TransferError when the ranks' ranges overlap or, once all are known, leave a page out."""
        if self._ranges[rank] is not None:
            raise WireError(f"rank {rank} announced twice")
        try:
            self._ranges[rank] = ownership.check_ranges(message.ranges, self.num_pages)
        except ValueError as error:
            raise TransferError(f"Prefill rank {rank} announced wrong pages. {error}") from error
        if all(ranges is not None for ranges in self._ranges):
            self._check_partitions()

    def check_block(self, rank: int, block: Block) -> None:
        """Raises WireError unless the block is new and inside what the rank announced."""
        window = (block.first_page, block.first_page + block.num_pages)
        if ownership.count(ownership.clip(self._ranges[rank] or (), window)) != block.num_pages:
            raise WireError(f"rank {rank} sent {block}, outside the pages it announced")
        if self._cells(rank, block).any():
            raise WireError(f"rank {rank} sent {block}, of which a part had arrived before")

    def add_block(self, rank: int, block: Block, num_bytes: int) -> None:
        """Counts a block that `check_block` let through and that is written."""
        self._cells(rank, block)[:] = True
        self._bytes_of_rank[rank] += num_bytes
        self.num_bytes += num_bytes

    def add_aux(self, rank: int, payload: Buffer) -> None:
        if self._aux_rank is None:
            self._aux_rank, self.aux = rank, payload
        elif self._part_of_rank[rank] == self._part_of_rank[self._aux_rank]:
            raise WireError(f"rank {rank} sent the first-token record again")

    def end(self, rank: int, message: End) -> None:
        """Raises TransferError when the rank ends although bytes of it are missing, or no rank sent aux."""
        if self._ranges[rank] is None or rank in self._ends:
            raise WireError(f"rank {rank} ended {'twice' if rank in self._ends else 'before it announced'}")
        self._check_bytes(rank, message)
        self._ends[rank] = message
        if len(self._ends) == len(self._ranges):
            if self.aux is None:
                raise TransferError("No prefill rank sent the request's first token.")
            self.num_hidden_bytes = sum(end.num_hidden_bytes for end in self._ends.values())
            self.info = self._merge_info()

    def _check_partitions(self) -> None:
        for part in range(len(self._arrived)):
            ranges = [
                ranges or ()
                for ranges, part_of_rank in zip(self._ranges, self._part_of_rank, strict=True)
                if part_of_rank == part
            ]
            wrong = ownership.find_partition_error(ranges, self.num_pages)
            if wrong:
                raise TransferError(f"The prefill ranks do not share the prompt out exactly: {wrong}.")

    def _cells(self, rank: int, block: Block) -> np.ndarray:
        return self._arrived[
            self._part_of_rank[rank],
            block.first_buffer : block.first_buffer + block.num_buffers,
            block.first_page : block.first_page + block.num_pages,
        ]

    def _check_bytes(self, rank: int, message: End) -> None:
        missing = sum(int(self._missing(rank, window)) for window in self._ranges[rank] or ())
        received = self._bytes_of_rank[rank]
        if missing or received != message.num_bytes:
            raise TransferError(
                f"Prefill rank {rank} ended with {missing} bytes of its pages missing "
                f"({received} arrived intact, it sent {message.num_bytes})."
            )

    def _missing(self, rank: int, window: PageRange) -> np.int64:
        arrived = self._arrived[self._part_of_rank[rank], :, window[0] : window[1]]
        if arrived.all():  # the rule, and many times faster than to count
            return np.int64(0)
        return (~arrived).sum(axis=1) @ self._item_lens

    def _merge_info(self) -> dict[str, int | str]:
        merged: dict[str, int | str] = {}
        for rank in sorted(self._ends, reverse=True):
            info: Mapping[str, int | str] = self._ends[rank].info
            merged.update(info)
        return merged
