"""Triton kernels: one file an operation `x`, with `x_triton` and, in plain PyTorch, `x_reference`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sglang_apb.kernels.key_diff import key_diff_reference, key_diff_triton
from sglang_apb.kernels.merge import merge_reference, merge_triton
from sglang_apb.kernels.pack import pack_reference, pack_triton
from sglang_apb.kernels.query import query_reference, query_triton
from sglang_apb.kernels.select import CHUNKS, select_reference, select_triton


@dataclass(frozen=True)
class Kernels:
    """What a sparse prompt's layer computes beside attention; `x_reference` says what each takes and gives."""

    query: Callable[..., torch.Tensor]
    key_diff: Callable[..., torch.Tensor]
    select: Callable[..., torch.Tensor]
    pack: Callable[..., None]
    merge: Callable[..., None]
    # How many candidates a block has at most, for each of the forms that `select` is compiled in.
    select_lengths: tuple[int, ...] = ()


REFERENCE = Kernels(query_reference, key_diff_reference, select_reference, pack_reference, merge_reference)
TRITON = Kernels(query_triton, key_diff_triton, select_triton, pack_triton, merge_triton, CHUNKS)
