"""The kernel that copies KV pages against its torch reference. As in test_kernels.py, which interprets this file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sglang_apb.kernels.page_copy import (
    TILE_BYTES,
    PageCopy,
    PagePlace,
    copy_pages_reference,
    copy_pages_triton,
    in_one_piece,
)
from test_kernels import on_device

from sglang_apb.transfer.memory.pages import HostPages

PAGE_SIZES = {
    "16-byte words": [64, 64, 64],
    "2-byte words": [6, 6],
    "different sizes": [48, 160, 16],
    "one odd size": [48, 50],
    "several columns": [TILE_BYTES + 32],
    "several columns, narrow": [TILE_BYTES + 2],
}
NUM_PAGES = 9


def random_pool(sizes: list[int], device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randint(256, (NUM_PAGES, size), generator=generator, dtype=torch.uint8) for size in sizes]
    return [buffer.to(device) for buffer in drawn]


class TestInOnePiece:
    """A pool's pages to one piece of memory and back."""

    def copies(self, pool: list[torch.Tensor], piece: torch.Tensor) -> tuple[PageCopy, PageCopy]:
        lengths = [buffer.shape[1] for buffer in pool]
        places = [PagePlace(buffer.data_ptr(), size, size) for buffer, size in zip(pool, lengths, strict=True)]
        ends = places, in_one_piece(piece.data_ptr(), 1, lengths)
        return tuple(PageCopy.between(*each, 1, lengths, piece.device) for each in (ends, ends[::-1]))

    @on_device
    @pytest.mark.parametrize("sizes", PAGE_SIZES.values(), ids=PAGE_SIZES)
    @pytest.mark.parametrize("ids", [[], [3], [8, 0, 5, 1]], ids=str)
    @pytest.mark.parametrize("first", [0, 1])
    def test_kernel(self, device: str, sizes: list[int], ids: list[int], first: int) -> None:
        if first >= len(sizes):
            pytest.skip("one buffer")
        here, there = random_pool(sizes), random_pool(sizes, device)
        host = HostPages([buffer.flatten().numpy() for buffer in here], sizes)
        num_buffers = len(sizes) - first
        wanted = host.gather(first, num_buffers, np.array(ids, np.int64)) if ids else np.zeros(0, np.uint8)
        piece = torch.zeros(len(wanted) + 2, dtype=torch.uint8, device=device)
        from_pool, to_pool = self.copies(there, piece)
        index, in_order = torch.tensor(ids, dtype=torch.int64, device=device), torch.arange(len(ids), device=device)
        copy_pages_triton(from_pool, first, num_buffers, index, in_order)
        assert np.array_equal(piece[:-2].cpu().numpy(), wanted) and not piece[-2:].any()
        copy_pages_triton(to_pool, first, num_buffers, in_order, (index + 1) % NUM_PAGES)
        if ids:
            host.scatter(first, num_buffers, (np.array(ids) + 1) % NUM_PAGES, wanted.data)
        for buffer, other in zip(here, there, strict=True):
            assert torch.equal(other.cpu(), buffer)

    @on_device
    def test_memory_that_is_not_aligned(self, device: str) -> None:
        pool = random_pool([48, 160, 16], device)
        memory = torch.zeros(2 * 176 + 2, dtype=torch.uint8, device=device)
        from_pool, _ = self.copies(pool, memory[2:])
        copy_pages_triton(from_pool, 1, 2, torch.tensor([2, 6], device=device), torch.arange(2, device=device))
        assert torch.equal(memory[2:], torch.cat([buffer[[2, 6]].flatten() for buffer in pool[1:]]))

    @on_device
    def test_another_order_of_pages_is_noticed(self, device: str) -> None:
        pool = random_pool([64, 64], device)
        piece = torch.zeros(256, dtype=torch.uint8, device=device)
        from_pool, _ = self.copies(pool, piece)
        copy_pages_triton(from_pool, 0, 2, torch.tensor([2, 1], device=device), torch.arange(2, device=device))
        assert not torch.equal(piece, torch.cat([buffer[[1, 2]].flatten() for buffer in pool]))


class TestBetweenPools:
    """Between pools whose pages have some heads in common: as views, [pages, rows, bytes of these heads]."""

    def views(self, pool: list[torch.Tensor], num_rows: int, first: int, length: int) -> list[torch.Tensor]:
        return [buffer.view(NUM_PAGES, num_rows, -1)[:, :, first : first + length] for buffer in pool]

    def copy(self, sources: list[torch.Tensor], targets: list[torch.Tensor], length: int) -> PageCopy:
        places = [
            [PagePlace(view.data_ptr(), view.stride(0), view.stride(1)) for view in views]
            for views in (sources, targets)
        ]
        lengths = [length] * len(sources)
        return PageCopy.between(*places, sources[0].shape[1], lengths, sources[0].device)

    @on_device
    @pytest.mark.parametrize(
        ("rows", "of_source", "of_target", "length"),
        [
            *((1, (64, 0), (64, 0), 64), (3, (64, 32), (32, 0), 32), (2, (48, 16), (96, 64), 16)),
            *((3, (6, 2), (4, 0), 4), (1, (TILE_BYTES + 32, 16), (TILE_BYTES + 32, 0), 16400)),
        ],
    )
    @pytest.mark.parametrize("ids", [[], [3], [8, 0, 5, 1]], ids=str)
    def test_kernel(
        self,
        device: str,
        rows: int,
        of_source: tuple[int, int],
        of_target: tuple[int, int],
        length: int,
        ids: list[int],
    ) -> None:
        source = random_pool([rows * of_source[0]] * 3, device)
        found, wanted = (random_pool([rows * of_target[0]] * 3, device) for _ in range(2))
        for pool in (found, wanted):
            for buffer in pool:
                buffer.zero_()
        from_ids = torch.tensor(ids, dtype=torch.int64, device=device)
        to_ids = (from_ids + 1) % NUM_PAGES
        sources = self.views(source, rows, of_source[1], length)
        copy_pages_reference(sources[1:], self.views(wanted, rows, of_target[1], length)[1:], from_ids, to_ids)
        copy = self.copy(sources, self.views(found, rows, of_target[1], length), length)
        copy_pages_triton(copy, 1, 2, from_ids, to_ids)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)
        assert bool(ids) == any(buffer.any() for buffer in found)

    def test_places_of_an_odd_size_are_refused(self) -> None:
        place = PagePlace(0, 9, 3)
        with pytest.raises(ValueError, match="odd size"):
            PageCopy.between([place], [place], 3, [3], torch.device("cpu"))
