"""Anchor, passing and own block by one paged causal call of FlashInfer's, beside the two calls and a merge of ours.

    one buffer of keys:   [shared | own rows]          a block's page table: [pages of its prefix | its own pages]

FlashInfer's causal mask is aligned at the bottom right: with p keys in front, query i of a block sees p + i + 1 keys.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_apb.attention.flashinfer import WORKSPACE_BYTES
from sglang_apb.commands.bench.calls import Case, LayerCalls
from sglang_apb.commands.bench.observed import BEFORE, OWN
from sglang_apb.layout import Span

LARGEST_PAGE = 64


@dataclass(frozen=True)
class PageTable:
    """Which pages of the buffer each block's queries see; int32 tensors on the host, as FlashInfer's planner wants.

    `num_rows`: of the buffer, whole pages. Offsets have an entry more than there are blocks.
    """

    page_size: int
    num_rows: int
    query_offsets: torch.Tensor
    page_offsets: torch.Tensor
    pages: torch.Tensor
    last_page_lengths: torch.Tensor

    @classmethod
    def of(cls, blocks: Sequence[tuple[Span, int]], num_shared: int) -> PageTable:
        """blocks: own rows, which follow each other from 0 on, and the length of the prefix of `shared` they see.

        Pages are as large as borders allow.
        """
        page = math.gcd(LARGEST_PAGE, num_shared, *(n for span, prefix in blocks for n in (span.start, prefix)))
        tables = [
            [*range(prefix // page), *range((num_shared + span.start) // page, -(-(num_shared + span.end) // page))]
            for span, prefix in blocks
        ]
        lengths = [prefix + len(span) for span, prefix in blocks]
        last = [length - (len(table) - 1) * page for length, table in zip(lengths, tables, strict=True)]
        return cls(
            page,
            -(-(num_shared + blocks[-1][0].end) // page) * page,
            _offsets([len(span) for span, _ in blocks]),
            _offsets([len(table) for table in tables]),
            torch.tensor(list(itertools.chain(*tables)), dtype=torch.int32),
            torch.tensor(last, dtype=torch.int32),
        )


def one_call_cases(calls: LayerCalls) -> tuple[list[Case], str]:
    """The call, and the copy of own rows behind what was handed on; and how far its result is from the two calls'.

    CUDA and FlashInfer only. Where nothing was handed on to this rank there is nothing to compare: no case.
    """
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    before = calls.of(BEFORE)
    if not before:
        return [], ""
    (own,) = calls.of(OWN)
    q, k, v, scale, _ = own.args
    shared = before[0].args[1:3]
    num_shared = shared[0].shape[0]
    table = PageTable.of(calls.block_rows, num_shared)
    end = calls.block_rows[-1][0].end
    buffers = [x.new_zeros((table.num_rows, *x.shape[1:])) for x in (k, v)]
    for buffer, handed_on in zip(buffers, shared, strict=True):
        buffer[:num_shared] = handed_on

    def copy() -> None:
        for buffer, rows in zip(buffers, (k, v), strict=True):
            buffer[num_shared : num_shared + end] = rows[:end]

    wrapper = BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device), "NHD"
    )
    wrapper.plan(
        qo_indptr=table.query_offsets,
        paged_kv_indptr=table.page_offsets,
        paged_kv_indices=table.pages,
        paged_kv_last_page_len=table.last_page_lengths,
        num_qo_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim_qk=q.shape[2],
        page_size=table.page_size,
        causal=True,
        sm_scale=scale,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    pages = tuple(buffer.unflatten(0, (-1, table.page_size)) for buffer in buffers)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    pairs = sum(len(span) * prefix + len(span) * (len(span) + 1) // 2 for span, prefix in calls.block_rows)
    cases = [
        Case("one call: copy own rows", copy, num_bytes=4 * end * k[0].nbytes),
        Case(
            f"one call, pages of {table.page_size}",
            lambda: wrapper.run(q, pages, out=out),
            flop=4 * pairs * q.shape[1] * q.shape[2],
        ),
    ]
    for case in cases:
        case.run()
    return cases, f"one call differs from two by at most {_distance(calls, out):.2g}"


def _distance(calls: LayerCalls, out: torch.Tensor) -> float:
    """Largest difference from what the two calls and their merge gave, over rows that see something handed on."""
    farthest = 0.0
    for merge in calls.context_merges:
        merged = merge.args[2]  # a slice of all rows' result
        start = merged.storage_offset() // merged.stride(0)
        farthest = max(farthest, float((out[start : start + len(merged)].float() - merged.float()).abs().max()))
    return farthest


def _offsets(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
