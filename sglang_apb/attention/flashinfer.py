"""Attention with FlashInfer's prefill kernels: FlashAttention-3 on Hopper, FlashAttention-2 elsewhere.

Its ways, each where it is the fastest (docs/performance.md):

    causal pieces            all in one call, planned once a prompt        BatchPrefillWithRaggedKVCacheWrapper
    several pieces           the same, over a copy of each piece's keys
    one piece, many queries  contiguous keys, nothing to plan              single_prefill_with_kv_cache
    one piece, few queries   keys in parts, to give every multiprocessor   the first again, and a merge
                             something to do
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from sglang_apb.attention.base import Attention, AttentionEngine, Build, Partial, Piece
from sglang_apb.kernels import TRITON, Kernels
from sglang_apb.layout import Span

# FlashInfer's FlashAttention-2 splits the keys of calls with few queries and keeps the parts here: 130 MB for 256
# question tokens of 64 heads. As much as SGLang gives it (layers/attention/flashinfer_backend.py).
WORKSPACE_BYTES = 512 << 20
# Queries and head of one thread block in FlashInfer's kernels for Hopper (hopper/prefill_sm90.cuh); one runs on a
# multiprocessor at a time.
QUERIES_A_BLOCK = 128
# Parts of a few queries' keys: two thread blocks a multiprocessor, and not more than a merge takes at once.
BLOCKS_A_MULTIPROCESSOR = 2
MAX_PARTS = 8


class FlashInferEngine(AttentionEngine):
    """Plans are made when the first layer shows its heads. All use one workspace: they run in turn on one stream."""

    kernels: Kernels = TRITON

    def __init__(self) -> None:
        self._wrappers: dict[int, _Wrapper] = {}
        self._workspace: torch.Tensor | None = None

    def plan(self, calls: Sequence[Sequence[Piece]]) -> list[Attention]:
        return [self._plan(index, tuple(pieces)) for index, pieces in enumerate(calls)]

    def builds(
        self, num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> Iterable[Build]:
        """Each of FlashInfer's modules, and our merging of each number of parts."""
        queries_of = {
            _num_parts(Piece(n, Span(0, n)), num_q_heads, num_multiprocessors(device)): n
            for n in range(QUERIES_A_BLOCK, _queries_of_one_part(num_q_heads, device) + 1, QUERIES_A_BLOCK)
        }

        def attend(piece: Piece) -> None:
            widths = (num_q_heads, num_kv_heads, num_kv_heads)
            rows = torch.randn(piece.num_queries, sum(widths), head_dim, dtype=dtype, device=device)
            (attention,) = self.plan([[piece]])
            q, k, v = rows.split(widths, dim=1)
            attention(q, k, v, head_dim**-0.5)

        one_block = Span(0, QUERIES_A_BLOCK)
        yield Build("FlashInfer's ragged attention", partial(attend, Piece(len(one_block), one_block, causal=True)))
        for num_parts, num_queries in queries_of.items():
            name = "FlashInfer's single attention" if num_parts == 1 else f"merging of {num_parts} parts"
            yield Build(name, partial(attend, Piece(num_queries, Span(0, num_queries))))
        yield Build("FlashInfer's cascade, by which SGLang merges a long exact prompt's chunks", _build_cascade)

    def _plan(self, index: int, pieces: tuple[Piece, ...]) -> Attention:
        attention: Attention | None = None

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor | None = None
        ) -> Partial:
            nonlocal attention
            if attention is None:
                attention = self._attention(index, pieces, q, k, scale)
            return attention(q, k, v, scale, out)

        return attend

    def _attention(
        self, index: int, pieces: tuple[Piece, ...], q: torch.Tensor, k: torch.Tensor, scale: float
    ) -> Attention:
        if pieces[0].causal:
            wrapper = self._wrapper(index, q.device)
            lengths = [len(piece.keys) for piece in pieces]
            wrapper.plan_pieces(lengths, lengths, True, q, k, scale)
            return _Causal(wrapper, slice(pieces[0].keys.start, pieces[-1].keys.end))
        if len(pieces) > 1:
            wrapper = self._wrapper(index, q.device)
            lengths = [len(piece.keys) for piece in pieces]
            wrapper.plan_pieces([piece.num_queries for piece in pieces], lengths, False, q, k, scale)
            numbers = [torch.arange(piece.keys.start, piece.keys.end, device=q.device) for piece in pieces]
            return _Copied(wrapper, torch.cat(numbers))
        (piece,) = pieces
        num_parts = _num_parts(piece, q.shape[1], num_multiprocessors(q.device))
        if num_parts == 1:
            return _Single(slice(piece.keys.start, piece.keys.end))
        borders = [len(piece.keys) * part // num_parts for part in range(num_parts + 1)]
        lengths = [end - start for start, end in itertools.pairwise(borders)]
        wrapper = self._wrapper(index, q.device)
        wrapper.plan_pieces([piece.num_queries] * num_parts, lengths, False, q, k, scale)
        return _InParts(wrapper, slice(piece.keys.start, piece.keys.end), num_parts, self.kernels)

    def _wrapper(self, index: int, device: torch.device) -> _Wrapper:
        if index not in self._wrappers:
            from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

            if self._workspace is None:
                self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            self._wrappers[index] = _Wrapper(BatchPrefillWithRaggedKVCacheWrapper(self._workspace, "NHD"))
        return self._wrappers[index]


@dataclass
class _Wrapper:
    """One of FlashInfer's wrappers. Making one takes milliseconds, so prompts share it one after the other."""

    flashinfer: Any
    planned: torch.cuda.Event | None = field(default=None)

    def plan_pieces(
        self,
        num_queries: Sequence[int],
        num_keys: Sequence[int],
        causal: bool,
        q: torch.Tensor,
        k: torch.Tensor,
        scale: float,
    ) -> None:
        """`plan` fills a pinned buffer of the wrapper's and starts its copy to the GPU. The host runs ahead of the
        GPU: the copy of the prompt before may not have started yet, and would then take this prompt's plan.
        """
        if self.planned is not None:
            self.planned.synchronize()
        self.flashinfer.plan(
            qo_indptr=_offsets(num_queries),
            kv_indptr=_offsets(num_keys),
            num_qo_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim_qk=q.shape[2],
            causal=causal,
            sm_scale=scale,
            q_data_type=q.dtype,
            kv_data_type=k.dtype,
        )
        self.planned = torch.cuda.Event()
        self.planned.record()

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None = None) -> Partial:
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        self.flashinfer.run(q, k, v, out=out, lse=lse, return_lse=True)
        return Partial(out, lse)


@dataclass(frozen=True)
class _Causal:
    """All pieces at once; `keys` are theirs together, read as they lie."""

    wrapper: _Wrapper
    keys: slice

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor | None = None
    ) -> Partial:
        return self.wrapper.run(q, k[self.keys], v[self.keys], out)


@dataclass(frozen=True)
class _Copied:
    """Pieces that may share keys, of which `keys` are the numbers, piece after piece: copying them costs less than
    reading them page by page, and one call less of the host's time than many.
    """

    wrapper: _Wrapper
    keys: torch.Tensor

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor | None = None
    ) -> Partial:
        return self.wrapper.run(q, k.index_select(0, self.keys), v.index_select(0, self.keys), out)


@dataclass(frozen=True)
class _Single:
    keys: slice

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor | None = None
    ) -> Partial:
        from flashinfer import single_prefill_with_kv_cache

        attended, lse = single_prefill_with_kv_cache(q, k[self.keys], v[self.keys], sm_scale=scale, return_lse=True)
        return Partial(attended if out is None else out.copy_(attended), lse)


@dataclass(frozen=True)
class _InParts:
    """The same queries over `num_parts` parts of the keys, merged."""

    wrapper: _Wrapper
    keys: slice
    num_parts: int
    kernels: Kernels

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor | None = None
    ) -> Partial:
        parts = self.wrapper.run(torch.cat((q,) * self.num_parts), k[self.keys], v[self.keys])
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        self.kernels.merge(parts.out.split(len(q)), parts.lse.split(len(q)), out, lse)
        return Partial(out, lse)


def num_multiprocessors(device: torch.device | str) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _num_parts(piece: Piece, num_heads: int, num_multiprocessors: int) -> int:
    """1 where the queries keep half of the multiprocessors busy by themselves, or there is little to part."""
    num_blocks = -(-piece.num_queries // QUERIES_A_BLOCK) * num_heads
    if 2 * num_blocks > num_multiprocessors or len(piece.keys) < MAX_PARTS:
        return 1
    return max(min(MAX_PARTS, BLOCKS_A_MULTIPROCESSOR * num_multiprocessors // num_blocks), 1)


def _queries_of_one_part(num_heads: int, device: torch.device | str) -> int:
    """The fewest whole blocks of queries that `_num_parts` does not part the keys for."""
    return QUERIES_A_BLOCK * (num_multiprocessors(device) // (2 * num_heads) + 1)


def _build_cascade() -> None:
    from flashinfer.cascade import get_cascade_module

    get_cascade_module()


def _offsets(lengths: Sequence[int]) -> torch.Tensor:
    """[0, n0, n0 + n1, ...], int32 on the host, where FlashInfer's planner reads it."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
