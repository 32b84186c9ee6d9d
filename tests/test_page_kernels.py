"""The kernels that move KV pages against their torch references. As in test_kernels.py, which interprets this file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sglang_apb.kernels import page_copy, pages
from test_kernels import on_device

from sglang_apb.transfer.pages import HostPages

PAGE_SIZES = {
    "16-byte words": [64, 64, 64],
    "2-byte words": [6, 6],
    "different sizes": [48, 160, 16],
    "one odd size": [48, 50],
    "several columns": [pages.TILE_BYTES + 32],
    "several columns, narrow": [pages.TILE_BYTES + 2],
}
NUM_PAGES = 9


def random_pool(sizes: list[int], device: str = "cpu") -> pages.PageBuffers:
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randint(256, (NUM_PAGES, size), generator=generator, dtype=torch.uint8) for size in sizes]
    return pages.PageBuffers.of([buffer.to(device) for buffer in drawn])


def payload_of(pool: pages.PageBuffers, num_ids: int) -> torch.Tensor:
    return torch.zeros(num_ids * sum(pool.item_lens), dtype=torch.uint8, device=pool.table.device)


class TestPages:
    def test_reference_is_the_transfers(self) -> None:
        sizes, ids = [48, 160, 16], torch.tensor([7, 0, 3])
        pool = random_pool(sizes)
        host = HostPages([buffer.flatten().numpy() for buffer in pool.buffers], sizes)
        payload = payload_of(pool.part(1, 2), 3)
        pages.gather_pages_reference(pool.part(1, 2), ids, payload)
        assert np.array_equal(payload.numpy(), host.gather(1, 2, ids.numpy()))
        pages.scatter_pages_reference(pool.part(1, 2), ids + 1, payload)
        assert torch.equal(pool.buffers[2][[8, 1, 4]].flatten(), payload[3 * 160 :])

    @on_device
    @pytest.mark.parametrize("sizes", PAGE_SIZES.values(), ids=PAGE_SIZES)
    @pytest.mark.parametrize("ids", [[], [3], [8, 0, 5, 1]], ids=str)
    def test_kernel(self, device: str, sizes: list[int], ids: list[int]) -> None:
        here, there = random_pool(sizes), random_pool(sizes, device)
        index = torch.tensor(ids, dtype=torch.int64)
        wanted, found = payload_of(here, len(ids)), payload_of(there, len(ids))
        pages.gather_pages_reference(here, index, wanted)
        pages.gather_pages_triton(there, index.to(device), found)
        assert torch.equal(found.cpu(), wanted)
        pages.scatter_pages_reference(here, (index + 1) % NUM_PAGES, wanted)
        pages.scatter_pages_triton(there, ((index + 1) % NUM_PAGES).to(device), found)
        for buffer, other in zip(here.buffers, there.buffers, strict=True):
            assert torch.equal(other.cpu(), buffer)

    @on_device
    def test_payload_that_is_not_aligned_and_part_of_a_pool(self, device: str) -> None:
        here, there = random_pool([48, 160, 16]).part(1, 2), random_pool([48, 160, 16], device).part(1, 2)
        ids = torch.tensor([2, 6])
        wanted, found = payload_of(here, 2), torch.zeros(2 * 176 + 2, dtype=torch.uint8, device=device)[2:]
        pages.gather_pages_reference(here, ids, wanted)
        pages.gather_pages_triton(there, ids.to(device), found)
        assert torch.equal(found.cpu(), wanted)

    @on_device
    def test_another_order_of_pages_is_noticed(self, device: str) -> None:
        here, there = random_pool([64, 64]), random_pool([64, 64], device)
        wanted, found = payload_of(here, 2), payload_of(there, 2)
        pages.gather_pages_reference(here, torch.tensor([1, 2]), wanted)
        pages.gather_pages_triton(there, torch.tensor([2, 1], device=device), found)
        assert not torch.equal(found.cpu(), wanted)

    def test_pages_and_payloads_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(ValueError, match="even size"):
            random_pool([7])
        pool = random_pool([8])
        with pytest.raises(ValueError, match="2 pages of 8 bytes do not fill 8 bytes"):
            pages.gather_pages_triton(pool, torch.tensor([0, 1]), payload_of(pool, 1))


class TestPageCopy:
    """Between pools whose pages have some heads in common: as views, [pages, rows, bytes of these heads]."""

    def views(self, pool: pages.PageBuffers, num_rows: int, first: int, length: int) -> list[torch.Tensor]:
        return [buffer.view(NUM_PAGES, num_rows, -1)[:, :, first : first + length] for buffer in pool.buffers]

    def copy(self, sources: list[torch.Tensor], targets: list[torch.Tensor], length: int) -> page_copy.PageCopy:
        places = [
            [page_copy.PagePlace(view.data_ptr(), view.stride(0), view.stride(1)) for view in views]
            for views in (sources, targets)
        ]
        lengths = [length] * len(sources)
        return page_copy.PageCopy.between(*places, sources[0].shape[1], lengths, sources[0].device)

    @on_device
    @pytest.mark.parametrize(
        ("rows", "of_source", "of_target", "length"),
        [
            *((1, (64, 0), (64, 0), 64), (3, (64, 32), (32, 0), 32), (2, (48, 16), (96, 64), 16)),
            *((3, (6, 2), (4, 0), 4), (1, (page_copy.TILE_BYTES + 32, 16), (page_copy.TILE_BYTES + 32, 0), 16400)),
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
            for buffer in pool.buffers:
                buffer.zero_()
        from_ids = torch.tensor(ids, dtype=torch.int64, device=device)
        to_ids = (from_ids + 1) % NUM_PAGES
        sources = self.views(source, rows, of_source[1], length)
        page_copy.copy_pages_reference(
            sources[1:], self.views(wanted, rows, of_target[1], length)[1:], from_ids, to_ids
        )
        copy = self.copy(sources, self.views(found, rows, of_target[1], length), length)
        page_copy.copy_pages_triton(copy, 1, 2, from_ids, to_ids)
        for a, b in zip(found.buffers, wanted.buffers, strict=True):
            assert torch.equal(a, b)
        assert bool(ids) == any(buffer.any() for buffer in found.buffers)

    def test_places_of_an_odd_size_are_refused(self) -> None:
        place = page_copy.PagePlace(0, 9, 3)
        with pytest.raises(ValueError, match="odd size"):
            page_copy.PageCopy.between([place], [place], 3, [3], torch.device("cpu"))
