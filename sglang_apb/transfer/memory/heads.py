"""Which KV heads of the model a tensor-parallel rank holds, and a page's bytes of some of them.

heads of the model   [0 1 2 3 4 5 6 7]
prefill, tp 2        [0 1 2 3] [4 5 6 7]
decode, tp 4         [0 1] [2 3] [4 5] [6 7]     each prefill rank sends to two, half of its heads each

With more ranks than heads, several have the same. Of those that one decode rank asks, each sends a part of the pages.

heads of the model   [0 1]
prefill, tp 4        [0] [0] [1] [1]
decode, tp 1         [0 1]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sglang_apb.transfer.memory.gpu_pages import CudaPages, GpuSide, StagedPages
from sglang_apb.transfer.memory.pages import Bytes, HostPages, PageIds, Pages
from sglang_apb.transfer.protocol.wire import Buffer


def heads_of(tp_rank: int, tp_size: int, num_kv_heads: int) -> range:
    """As SGLang's layers split them (layers/linear.py, QKVParallelLinear): with more ranks than heads, each head is on
    several. Raises ValueError when they cannot be shared out evenly.
    """
    if num_kv_heads % tp_size and tp_size % num_kv_heads:
        raise ValueError(
            f"{num_kv_heads} KV heads cannot be shared out evenly to {tp_size} ranks: use a tensor parallel size that "
            "divides their number."
        )
    if tp_size > num_kv_heads:
        head = tp_rank // (tp_size // num_kv_heads)
        return range(head, head + 1)
    num_own = num_kv_heads // tp_size
    return range(tp_rank * num_own, (tp_rank + 1) * num_own)


def overlap(mine: range, theirs: range) -> range:
    return range(max(mine.start, theirs.start), min(mine.stop, theirs.stop))


def find_no_overlap(ours: range, asked: range) -> str:
    """What a decode rank is told that asks a prefill rank for heads of which it has none; "" if it has."""
    if overlap(ours, asked):
        return ""
    return f"A decode rank asked for KV heads {_interval(asked)} of a prefill rank that has {_interval(ours)}."


@dataclass(frozen=True)
class Shares:
    """Which of a decode rank's KV `heads` each prefill rank brings it, numbered as in the model, and which share of its
    pages: (index, number of tensor-parallel ranks with the same heads that this decode rank asks). Without
    `page_shares` there are no two.

    `num_askers` decode ranks ask these prefill ranks, and this one is number `asker` of them.
    Raises ValueError when the parts are not equal, or leave a head out.
    """

    heads: range
    of_ranks: tuple[range, ...]
    asker: int = 0
    num_askers: int = 1
    page_shares: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.page_shares:
            object.__setattr__(self, "page_shares", ((0, 1),) * len(self.of_ranks))
        together = [head for part in self._parts for head in part]
        if together != list(self.heads) or len({len(part) for part in self._parts}) > 1:
            raise ValueError(
                f"KV heads {_interval(self.heads)} cannot be put together from the prefill ranks', "
                f"{', '.join(map(_interval, self.of_ranks))}: give both servers tensor parallel sizes that divide the "
                "number of KV heads."
            )

    @classmethod
    def between(
        cls, tp_rank: int, tp_size: int, prefill_ranks: Sequence[int], prefill_size: int, num_kv_heads: int
    ) -> Shares:
        """Of decode rank `tp_rank` of `tp_size`, which asks tensor-parallel ranks `prefill_ranks` of `prefill_size`."""
        mine = heads_of(tp_rank, tp_size, num_kv_heads)
        of_ranks = tuple(overlap(mine, heads_of(rank, prefill_size, num_kv_heads)) for rank in prefill_ranks)
        num_askers = max(tp_size // prefill_size, 1)
        same_heads = [
            sorted({r for r, of in zip(prefill_ranks, of_ranks, strict=True) if of == part}) for part in of_ranks
        ]
        page_shares = tuple((same.index(rank), len(same)) for rank, same in zip(prefill_ranks, same_heads, strict=True))
        return cls(mine, of_ranks, tp_rank % num_askers, num_askers, page_shares)

    @property
    def part_of_rank(self) -> list[int]:
        return [self._parts.index(part) for part in self.of_ranks]

    @property
    def _parts(self) -> list[range]:
        return sorted(dict.fromkeys(self.of_ranks), key=lambda part: part.start)


def _interval(heads: range) -> str:
    return f"[{heads.start}, {heads.stop})"


class HeadPages:
    """`Pages` of some heads in this process's memory: of each token of a page, the bytes of these heads.

    buffers: uint8, flat, whole pages of item_lens bytes each; `part` of the `num_heads` heads in them.
    """

    def __init__(
        self, buffers: Sequence[torch.Tensor], item_lens: Sequence[int], page_size: int, num_heads: int, part: range
    ):
        self._rows = [
            _words(buffer.view(-1, page_size, num_heads, size // (page_size * num_heads)))[:, :, part.start : part.stop]
            for buffer, size in zip(buffers, item_lens, strict=True)
        ]
        self.item_lens = tuple(row[0].numel() * row.element_size() for row in self._rows)
        self.num_pages = min(len(row) for row in self._rows)

    def gather(self, first_buffer: int, num_buffers: int, ids: PageIds) -> Bytes:
        rows, index = self._rows[first_buffer : first_buffer + num_buffers], torch.from_numpy(ids)
        gathered: Bytes = torch.cat([row.index_select(0, index).view(torch.uint8).flatten() for row in rows]).numpy()
        return gathered

    def scatter(self, first_buffer: int, num_buffers: int, ids: PageIds, payload: Buffer) -> None:
        some = slice(first_buffer, first_buffer + num_buffers)
        arrived = torch.from_numpy(np.frombuffer(payload, np.uint8).copy())
        parts = arrived.split([len(ids) * size for size in self.item_lens[some]])
        for row, part in zip(self._rows[some], parts, strict=True):
            row[torch.from_numpy(ids)] = part.view(row.dtype).view(len(ids), *row.shape[1:])


def _words(rows: torch.Tensor) -> torch.Tensor:
    """The same bytes as the widest numbers that they make up: they are moved one at a time."""
    for dtype in (torch.complex128, torch.int64, torch.int32, torch.int16):
        if rows.shape[-1] % dtype.itemsize == 0 and rows.data_ptr() % dtype.itemsize == 0:
            return rows.view(dtype)
    return rows


class PagesByHeads:
    """A pool's pages, whole or of some of their heads; `heads` are those in the pool, numbered as in the model."""

    def __init__(self, pages: HostPages | CudaPages, heads: range, page_size: int):
        self._whole, self._heads, self._page_size = pages, heads, page_size
        self._parts: dict[range, Pages] = {heads: pages}
        if isinstance(pages, CudaPages):
            self._warm_up(pages)

    def of(self, part: range) -> Pages:
        """Made at its first use, which must not be in two threads at once."""
        if part not in self._parts:
            self._parts[part] = self._cut_out(part)
        return self._parts[part]

    def _warm_up(self, whole: CudaPages) -> None:
        """What copies parts of the sizes that other tensor-parallel sizes ask for: no request is to wait for Triton."""
        for num_heads in range(1, len(self._heads)):
            if len(self._heads) % num_heads == 0:
                self._staged(whole, range(self._heads.start, self._heads.start + num_heads)).warm_up()

    def _cut_out(self, part: range) -> Pages:
        whole = self._whole
        if isinstance(whole, CudaPages):
            return self._staged(whole, part)
        inside = range(part.start - self._heads.start, part.stop - self._heads.start)
        return HeadPages(whole.buffers, whole.item_lens, self._page_size, len(self._heads), inside)

    def _staged(self, whole: CudaPages, part: range) -> StagedPages:
        side = GpuSide.of(whole, self._heads, self._page_size)
        return StagedPages(side, part, whole.num_pages, whole.buffers[0].device)
