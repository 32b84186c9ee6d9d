from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from sglang_apb.transfer.memory.gpu_pages import UploadedIds, open_pool
from sglang_apb.transfer.memory.pages import BLOCK_BYTES, Pages, open_host_memory, plan_blocks

PAGE_SIZE, NUM_PAGES, NUM_HEADS = 16, 300, 3


def _make_pool(device: str) -> tuple[list[torch.Tensor], Pages]:
    """Two layers of keys (head size 8) and values (head size 12), as SGLang lays them out; one slot page spare."""
    generator = torch.Generator().manual_seed(1)
    buffers = [
        torch.randn((NUM_PAGES + 1) * PAGE_SIZE, NUM_HEADS, size, generator=generator).to(torch.bfloat16).to(device)
        for size in (8, 12, 8, 12)
    ]
    item_lens = [PAGE_SIZE * NUM_HEADS * size * 2 for size in (8, 12, 8, 12)]
    return buffers, open_pool(buffers, [NUM_PAGES * size for size in item_lens], item_lens)


def _check_moves(device: str) -> None:
    buffers, pages = _make_pool(device)
    expected = [buffer.cpu().clone() for buffer in buffers]
    ids = np.random.default_rng(2).permutation(NUM_PAGES)[:120].astype(np.int64)
    targets = ids[::-1].copy()
    assert pages.num_pages == NUM_PAGES
    moved = [(block, _gather(pages, block, ids)) for block in plan_blocks(pages.item_lens, range(4), 0, 120)]
    for block, payload in moved:
        ids_of_block = targets[block.first_page : block.first_page + block.num_pages]
        pages.scatter(block.first_buffer, block.num_buffers, ids_of_block, payload)
    for buffer, before in zip(buffers, expected, strict=True):
        by_page, was = (
            buffer.cpu().view(-1, PAGE_SIZE, *buffer.shape[1:]),
            before.view(-1, PAGE_SIZE, *before.shape[1:]),
        )
        after = was.clone()
        after[torch.from_numpy(targets)] = was[torch.from_numpy(ids)]
        assert torch.equal(by_page, after)


def _gather(pages: Pages, block, ids: np.ndarray) -> bytes:
    ids_of_block = ids[block.first_page : block.first_page + block.num_pages]
    return pages.gather(block.first_buffer, block.num_buffers, ids_of_block).tobytes()


def test_pages_move_in_host_memory() -> None:
    _check_moves("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pages_move_in_gpu_memory() -> None:
    _check_moves("cuda")


def test_memory_of_a_block_is_used_again_only_when_it_is_free() -> None:
    _, pages = _make_pool("cpu")
    ids = np.arange(4)
    first, second = pages.gather(0, 4, ids), pages.gather(0, 4, ids + 4)
    assert not np.shares_memory(first, second)
    view, kept = first.data, first.copy()
    del first
    gc.collect()
    pages.gather(0, 4, ids + 8)
    assert bytes(view) == kept.tobytes()


def test_pages_at_an_address() -> None:
    rows = np.arange(6 * 16, dtype=np.int32).reshape(6, 16)
    pages = open_host_memory([rows.ctypes.data], [rows.nbytes], [rows[0].nbytes])
    pages.scatter(0, 1, np.array([2]), pages.gather(0, 1, np.array([5])).data)
    assert (rows[2] == rows[5]).all() and rows[0, 0] == 0


def test_a_page_larger_than_a_block() -> None:
    buffer = torch.zeros(3 * (BLOCK_BYTES + 1), dtype=torch.uint8)
    pages = open_pool([buffer], [len(buffer)], [BLOCK_BYTES + 1])
    blocks = list(plan_blocks(pages.item_lens, range(1), 0, 3))
    assert [block.num_pages for block in blocks] == [1, 1, 1]
    assert pages.gather(0, 1, np.array([1])).nbytes == BLOCK_BYTES + 1


def test_the_ids_of_a_layers_blocks_are_uploaded_for_the_first_layer() -> None:
    ids = np.random.default_rng(3).permutation(NUM_PAGES)
    parts = [ids[start : start + 75] for start in range(0, NUM_PAGES, 75)]
    uploaded = UploadedIds(torch.device("cpu"))
    first = [uploaded.of(part) for part in parts]
    for again in (parts, [part.copy() for part in parts]):
        assert all(uploaded.of(part) is there for part, there in zip(again, first, strict=True))
    alike = parts[0].copy()
    alike[30:32] = alike[31:29:-1]
    assert torch.equal(uploaded.of(alike), torch.from_numpy(alike))
    for number in range(100):
        assert uploaded.of(np.arange(number, number + 75)).tolist() == list(range(number, number + 75))
    assert uploaded.of(parts[0]) is not first[0], "it keeps some"
