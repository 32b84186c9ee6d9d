"""The same oracle on GPUs: every kernel that the SDPA engine calls, and ranks joined by NCCL."""

from __future__ import annotations

import math

import pytest
import torch
from ranks import run_ranks
from test_sparse_attention import CONFIGS, TOLERANCE, errors_of_rounds, errors_on_rank

from sglang_apb import attention
from sglang_apb.attention.base import Piece
from sglang_apb.layout import Span

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# ||found - wanted|| / ||wanted||: what rounding of inputs and products leaves of each precision.
PRECISION = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


# Pieces of a call, and how many rows of q and k it has: the kinds of calls that a prompt makes.
CALLS = {
    "blocks that follow each other": [
        Piece(n, Span(s, s + n), causal=True) for s, n in ((7, 130), (137, 301), (438, 1))
    ],
    "blocks that share keys": [Piece(n, Span(0, keys)) for n, keys in ((130, 200), (301, 300), (64, 517))],
    "many queries, all keys": [Piece(9000, Span(0, 517))],
    "few queries, all keys": [Piece(60, Span(0, 517))],
}


def wanted_of(
    pieces: list[Piece], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its LSE of base 2 in float64, piece by piece."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    outs, lses, start = [], [], 0
    for piece in pieces:
        span = slice(piece.keys.start, piece.keys.end)
        logits = scale * torch.einsum("qhd,khd->hqk", q[start : start + piece.num_queries].double(), keys[span])
        if piece.causal:
            logits.masked_fill_(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), values[span]))
        lses.append(logits.logsumexp(-1).T / math.log(2))
        start += piece.num_queries
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [("torch", dtype) for dtype in PRECISION] + [("flashinfer", torch.float16), ("flashinfer", torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (32, 8, 128), (4, 4, 128)])
def test_engine_gives_attention_and_its_lse(
    engine: str, dtype: torch.dtype, call: str, num_q_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    """q, k and v are views into one projection's rows; the second plan finds the first one's wrapper in use."""
    pieces, created = CALLS[call], attention.create(engine)
    num_queries = sum(piece.num_queries for piece in pieces)
    num_rows = max(num_queries, *(piece.keys.end for piece in pieces)) + 127 & -128
    for _ in range(2):
        width = num_q_heads + 2 * num_kv_heads
        rows = torch.randn(num_rows, width, head_dim, device="cuda", dtype=dtype)
        q, k, v = rows.split((num_q_heads, num_kv_heads, num_kv_heads), dim=1)
        q = q[:num_queries]
        (attend,) = created.plan([pieces])
        given = torch.full(q.shape, torch.nan, dtype=dtype, device="cuda")
        for target in (None, given):  # layers
            found = attend(q, k, v, head_dim**-0.5, target)
        assert found.out is given
        out, lse = wanted_of(pieces, q, k, v, head_dim**-0.5)
        assert relative_error(found.out, out) < PRECISION[dtype]
        assert relative_error(found.lse, lse) < PRECISION[dtype]


def test_one_rank_equals_the_oracle() -> None:
    for name, error in errors_on_rank(None, 1, "cuda").items():
        assert error < TOLERANCE, name


def test_rows_of_any_rounds_are_those_of_the_whole_prompt() -> None:
    for name, error in errors_of_rounds(None, "cuda").items():
        assert error < TOLERANCE, name


def _errors_on_own_gpu(group: object, num_ranks: int) -> dict[str, float]:
    return errors_on_rank(group, num_ranks, "cuda")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_over_nccl_equal_the_oracle() -> None:
    for rank, errors in enumerate(run_ranks(2, _errors_on_own_gpu, 2, device="cuda")):
        assert errors.keys() == CONFIGS.keys()
        for name, error in errors.items():
            assert error < TOLERANCE, f"rank {rank}, {name}"
