"""Attention with FlashInfer's batch prefill kernels: FlashAttention-3 on Hopper, FlashAttention-2 elsewhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sglang_apb.attention.base import Attention, AttentionEngine, Partial, Piece
from sglang_apb.kernels import TRITON

# FlashInfer's FlashAttention-2 splits the keys of calls with few queries and keeps the parts here: 130 MB for 256
# question tokens of 64 heads. As much as SGLang gives it (layers/attention/flashinfer_backend.py).
WORKSPACE_BYTES = 512 << 20
# Keys that several blocks see a prefix of are read through a page table: fewer entries, the larger the page.
PAGE_SIZE = 64
# FlashInfer's logarithm is of base 2 (include/flashinfer/attention/state.cuh); ours are natural.
NATURAL = math.log(2)


class FlashInferEngine(AttentionEngine):
    """One kernel call for all pieces of a call, planned when the first layer shows its heads.

    All plans use one workspace: they run one after the other on one stream.
    """

    kernels = TRITON
    key_multiple = PAGE_SIZE

    def __init__(self) -> None:
        self._wrappers: dict[tuple[str, int], _Wrapper] = {}
        self._workspace: torch.Tensor | None = None

    def plan(self, calls: Sequence[Sequence[Piece]]) -> list[Attention]:
        return [self._plan(index, tuple(pieces)) for index, pieces in enumerate(calls)]

    def _plan(self, index: int, pieces: tuple[Piece, ...]) -> Attention:
        planned: _Planned | None = None

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Partial:
            nonlocal planned
            if planned is None:
                planned = self._planned(index, pieces, q, k, scale)
            return planned(q, k, v)

        return attend

    def _planned(self, index: int, pieces: tuple[Piece, ...], q: torch.Tensor, k: torch.Tensor, scale: float) -> Any:
        kind = _Ragged if _keys_follow_each_other(pieces) else _Prefixes
        key = (kind.__name__, index)
        if key not in self._wrappers:
            self._wrappers[key] = _Wrapper(kind.make(self._workspace_on(q.device)))
        planned = kind(self._wrappers[key], pieces)
        planned.plan(q, k, scale)
        return planned

    def _workspace_on(self, device: torch.device) -> torch.Tensor:
        if self._workspace is None:
            self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        return self._workspace


@dataclass
class _Wrapper:
    """One of FlashInfer's wrappers. Making one takes milliseconds, so prompts share it one after the other."""

    flashinfer: Any
    planned: torch.cuda.Event | None = field(default=None)

    def plan(self, **arguments: Any) -> None:
        """`plan` fills a pinned buffer of the wrapper's and starts its copy to the GPU. The host runs ahead of the
        GPU: the copy of the prompt before may not have started yet, and would then take this prompt's plan.
        """
        if self.planned is not None:
            self.planned.synchronize()
        self.flashinfer.plan(**arguments)
        self.planned = torch.cuda.Event()
        self.planned.record()


class _Planned:
    def __init__(self, wrapper: _Wrapper, pieces: tuple[Piece, ...]) -> None:
        self._wrapper = wrapper
        self._pieces = pieces

    def plan(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> None:
        self._wrapper.plan(
            qo_indptr=_offsets([piece.num_queries for piece in self._pieces]),
            num_qo_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim_qk=q.shape[2],
            causal=self._pieces[0].causal,
            sm_scale=scale,
            q_data_type=q.dtype,
            kv_data_type=k.dtype,
            **self._keys(),
        )

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Partial:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        self._run(q, k, v, out, lse)
        return Partial(out, lse.mul_(NATURAL))

    def _keys(self) -> dict[str, Any]:
        raise NotImplementedError

    def _run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
        raise NotImplementedError


class _Ragged(_Planned):
    """Pieces whose keys follow each other in k and v: read as they lie."""

    @staticmethod
    def make(workspace: torch.Tensor) -> Any:
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

        return BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")

    def _keys(self) -> dict[str, Any]:
        return {"kv_indptr": _offsets([len(piece.keys) for piece in self._pieces])}

    def _run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
        keys = slice(self._pieces[0].keys.start, self._pieces[-1].keys.end)
        self._wrapper.flashinfer.run(q, k[keys], v[keys], out=out, lse=lse, return_lse=True)


class _Prefixes(_Planned):
    """Pieces that each see a prefix of the same keys, through a page table that names pages several times."""

    @staticmethod
    def make(workspace: torch.Tensor) -> Any:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        return BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")

    def _keys(self) -> dict[str, Any]:
        lengths = [len(piece.keys) for piece in self._pieces]
        num_pages = [-(-length // PAGE_SIZE) for length in lengths]
        last = [length - (pages - 1) * PAGE_SIZE for length, pages in zip(lengths, num_pages, strict=True)]
        return {
            "paged_kv_indptr": _offsets(num_pages),
            "paged_kv_indices": torch.cat([torch.arange(pages, dtype=torch.int32) for pages in num_pages]),
            "paged_kv_last_page_len": torch.tensor(last, dtype=torch.int32),
            "page_size": PAGE_SIZE,
        }

    def _run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
        # [num_keys, num_kv_heads, head_dim] -> [num_pages, PAGE_SIZE, num_kv_heads, head_dim]
        pages = tuple(x.unflatten(0, (-1, PAGE_SIZE)) for x in (k, v))
        self._wrapper.flashinfer.run(q, pages, out=out, lse=lse, return_lse=True)


def _keys_follow_each_other(pieces: tuple[Piece, ...]) -> bool:
    return all(later.keys.start == piece.keys.end for piece, later in itertools.pairwise(pieces))


def _offsets(lengths: Sequence[int]) -> torch.Tensor:
    """[0, n0, n0 + n1, ...], int32 on the host, where FlashInfer's planner reads it."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
