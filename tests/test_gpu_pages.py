"""Where some heads' pages lie, in a pool and in a block: addresses, which need no GPU to be counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sglang_apb.kernels.page_copy import PageCopy, copy_pages_reference

from sglang_apb.transfer.gpu_pages import GpuSide
from sglang_apb.transfer.wire import Block

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


def view(place: object, num_pages: int, num_rows: int, length: int, memory: torch.Tensor) -> torch.Tensor:
    """What a place names, of the tensor in which it lies."""
    strides = (place.page_bytes, place.row_bytes, 1)
    return memory.view(-1).as_strided((num_pages, num_rows, length), strides, place.address - memory.data_ptr())


@pytest.mark.parametrize("part", [HEADS, range(5, 7)], ids=str)
def test_a_block_has_the_bytes_that_zmq_would_send(part: range) -> None:
    buffers, ids, block = pool(), torch.tensor([5, 0, 3]), Block(1, 2, 0, 3)
    side, packed = side_of(buffers), torch.zeros(10_000, dtype=torch.uint8)
    num_rows = side.num_rows(part)
    assert num_rows == (1 if part == HEADS else PAGE_SIZE)
    lengths = side.row_lengths(part, num_rows)
    places = side.places(part, num_rows)
    targets = side.packed(part, block, packed.data_ptr())
    copy_pages_reference(
        [view(places[b], NUM_PAGES, num_rows, lengths[b], buffers[b]) for b in (1, 2)],
        [view(targets[b - 1], 3, num_rows, lengths[b], packed) for b in (1, 2)],
        ids,
        torch.arange(3),
    )
    heads = slice(part.start - HEADS.start, part.stop - HEADS.start)
    wanted = torch.cat([buffers[b][ids][:, :, heads].flatten() for b in (1, 2)])
    assert torch.equal(packed[: len(wanted)], wanted) and not packed[len(wanted) :].any()
    copy = PageCopy.between(places[1:3], targets, num_rows, lengths[1:3], torch.device("cpu"))
    assert copy.table.shape == (2, 7) and copy.lengths == tuple(lengths[1:3])


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
