"""Where some heads' pages lie, in a pool and in a block: addresses, which need no GPU to be counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sglang_apb.kernels.page_copy import PageCopy, copy_pages_reference

from sglang_apb.transfer.memory.gpu_pages import GpuSide
from sglang_apb.transfer.protocol.wire import Block

NUM_PAGES, PAGE_SIZE, NUM_HEADS = 7, 2, 4
HEAD_BYTES = (6, 10, 6, 10)  # keys and values of two layers
HEADS = range(4, 8)


def pool(fill: int | None = None) -> list[torch.Tensor]:
    """[pages, tokens, heads, bytes] for each buffer."""
    shapes = [(NUM_PAGES, PAGE_SIZE, NUM_HEADS, size) for size in HEAD_BYTES]
    if fill is not None:
        return [torch.full(shape, fill, dtype=torch.uint8) for shape in shapes]
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]


def side_of(buffers: list[torch.Tensor]) -> GpuSide:
    lens = [PAGE_SIZE * NUM_HEADS * size for size in HEAD_BYTES]
    return GpuSide([buffer.data_ptr() for buffer in buffers], lens, HEADS, PAGE_SIZE)


def views(
    copy: PageCopy, end: slice, buffers: range, num_pages: tuple[int, int], memory: list[torch.Tensor]
) -> list[torch.Tensor]:
    """What one end of a copy of `buffers` names, of the tensors in which it lies: (pages there, pages copied)."""
    entries = copy.table[buffers.start : buffers.stop].tolist()
    found = []
    for entry, length, tensor in zip(entries, copy.lengths[buffers.start :], memory, strict=False):
        address, before, page_bytes, row_bytes = entry[end]
        offset = address - tensor.data_ptr() + num_pages[1] * (before - entries[0][end][1])
        shape, strides = (num_pages[0], copy.num_rows, length), (page_bytes, row_bytes, 1)
        found.append(tensor.view(-1).as_strided(shape, strides, offset))
    return found


@pytest.mark.parametrize("part", [HEADS, range(5, 7)], ids=str)
def test_a_block_has_the_bytes_that_zmq_would_send(part: range) -> None:
    buffers, ids, some = pool(), torch.tensor([5, 0, 3]), range(1, 3)
    side, packed = side_of(buffers), torch.zeros(10_000, dtype=torch.uint8)
    copy = side.copy_of(part, packed.data_ptr(), torch.device("cpu"), to_pool=False)
    assert copy.num_rows == (1 if part == HEADS else PAGE_SIZE)
    source, target = slice(0, 4), slice(4, 8)
    copy_pages_reference(
        views(copy, source, some, (NUM_PAGES, 3), buffers[1:3]),
        views(copy, target, some, (3, 3), [packed, packed]),
        ids,
        torch.arange(3),
    )
    heads = slice(part.start - HEADS.start, part.stop - HEADS.start)
    wanted = torch.cat([buffers[b][ids][:, :, heads].flatten() for b in some])
    assert torch.equal(packed[: len(wanted)], wanted) and not packed[len(wanted) :].any()
    assert len(wanted) == 3 * sum(side.page_lens(part)[b] for b in some)
    back = side.copy_of(part, packed.data_ptr(), torch.device("cpu"), to_pool=True)
    assert torch.equal(back.table[:, source], copy.table[:, target])
    assert torch.equal(back.table[:, target], copy.table[:, source])


def test_what_lies_as_it_is_sent_is_not_gathered() -> None:
    buffers = pool()
    side = side_of(buffers)
    assert side.straight(HEADS, Block(1, 1, 0, 3), np.array([2, 3, 4])) == buffers[1][2].data_ptr()
    for part, block, ids in (
        (range(5, 7), Block(1, 1, 0, 3), [2, 3, 4]),
        (HEADS, Block(1, 2, 0, 3), [2, 3, 4]),
        (HEADS, Block(1, 1, 0, 3), [2, 4, 3]),
    ):
        assert side.straight(part, block, np.array(ids)) is None
