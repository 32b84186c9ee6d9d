"""The kernels and attention calls that one rank makes in a layer, each to be run and timed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from sglang_apb import attention, selection
from sglang_apb.attention.base import AttentionEngine
from sglang_apb.backends.layer_rows import LayerRows
from sglang_apb.backends.sparse_attention import SparseAttention
from sglang_apb.commands.bench.observed import (
    BEFORE,
    MERGE,
    OWN,
    PACK,
    SCORES,
    SELECT,
    AttentionCall,
    ObservedEngine,
    ObservedSelector,
    StandInGroup,
)
from sglang_apb.commands.bench.setup import InProcess
from sglang_apb.kernels import TRITON
from sglang_apb.kernels.page_copy import copy_pages_reference, copy_pages_triton
from sglang_apb.layout import Layout, Span, num_rows
from sglang_apb.rank_group import RankGroup
from sglang_apb.transfer.memory.gpu_pages import GpuSide

T = TypeVar("T")


@dataclass
class Case:
    """Something to time: `flop` floating-point operations, or `num_bytes` read and written, at the least."""

    name: str
    run: Callable[[], Any]
    flop: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class Call:
    part: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    result: Any

    def __call__(self) -> Any:
        return self.function(*self.args)


@dataclass
class LayerCalls:
    """An `Observe` that keeps the calls of one layer, to be made again."""

    layout: Layout
    rank: int
    engine: AttentionEngine
    calls: list[Call] = field(default_factory=list)

    def __call__(self, part: str, function: Callable[..., T], *args: Any) -> T:
        result = function(*args)
        self.calls.append(Call(part, function, args, result))
        return result

    def of(self, part: str) -> list[Call]:
        return [call for call in self.calls if call.part == part]

    @property
    def context_merges(self) -> list[Call]:
        """Merges of own blocks with what was handed on."""
        before = {id(call.result.out) for call in self.of(BEFORE)}
        return [call for call in self.of(MERGE) if any(id(part) in before for part in call.args[0])]

    @property
    def block_rows(self) -> list[tuple[Span, int]]:
        """Rows of the own call's pieces, and how many keys handed on by others they see in front."""
        rows = self.layout.rows_of(self.rank)
        pieces = [(rows.anchor, 0)] if self.layout.recomputed else []
        return [*pieces, *((span, self.layout.num_shared_keys(block)) for block, span in rows.blocks.items())]


def group_of(rank: int, num_ranks: int) -> RankGroup:
    return RankGroup() if num_ranks == 1 else StandInGroup(rank, num_ranks)


def random_rows(setting: InProcess, num_tokens: int) -> LayerRows:
    shape = setting.shape
    torch.manual_seed(setting.seed)
    return LayerRows.random(
        num_tokens, shape.num_heads, shape.num_kv_heads, shape.head_dim, setting.device, setting.dtype
    )


def layer_calls(setting: InProcess, layout: Layout, rank: int) -> LayerCalls:
    """Runs one layer of rank `rank` alone and keeps what it called."""
    engine = attention.create(setting.engine)
    calls = LayerCalls(layout, rank, engine)
    selector = ObservedSelector(selection.create(setting.config.selector), engine.kernels, calls)
    sparse = SparseAttention(
        layout, group_of(rank, layout.num_ranks), ObservedEngine(engine, calls), selector, setting.device
    )
    sparse.attend(random_rows(setting, num_rows(sparse.rows.tokens)))
    return calls


def layer_cases(calls: LayerCalls) -> list[Case]:
    """A case for each kind of call: calls of one kind run one after the other."""
    by_name: dict[str, list[Call]] = {}
    for call in calls.calls:
        by_name.setdefault(_name(call), []).append(call)
    return [
        Case(name, _in_turn(same), sum(map(_flop, same)), sum(map(_num_bytes, same))) for name, same in by_name.items()
    ]


def context_case(calls: LayerCalls) -> Case:
    """All that attention over the context takes: own blocks, what was handed on, and their merging."""
    same = [*calls.of(OWN), *calls.of(BEFORE), *calls.context_merges]
    return Case("own blocks + before + merge", _in_turn(same), sum(map(_flop, same)))


def gather_case(setting: InProcess, layout: Layout, rank: int, engine: AttentionEngine) -> Case:
    """One layer's K and V of the rank's own tokens, from pages of one token that lie anywhere in the pool."""
    num_tokens = num_rows(layout.rows_of(rank).block_tokens.values())
    page_bytes = setting.shape.num_kv_heads * setting.shape.head_dim * setting.dtype.itemsize
    pool = [torch.zeros(num_tokens, 1, page_bytes, dtype=torch.uint8, device=setting.device) for _ in ("k", "v")]
    sent = torch.empty(len(pool), num_tokens, 1, page_bytes, dtype=torch.uint8, device=setting.device)
    ids, in_order = torch.randperm(num_tokens, device=setting.device), torch.arange(num_tokens, device=setting.device)
    run: Callable[[], None]
    if engine.kernels is TRITON:
        side = GpuSide([buffer.data_ptr() for buffer in pool], [page_bytes] * len(pool), range(1), 1)
        copy = side.copy_of(range(1), sent.data_ptr(), torch.device(setting.device), to_pool=False)
        run = partial(copy_pages_triton, copy, 0, len(pool), ids, in_order)
    else:
        run = partial(copy_pages_reference, pool, list(sent), ids, in_order)
    return Case("gather pages", run, num_bytes=2 * sent.nbytes)


def _name(call: Call) -> str:
    if call.part != MERGE:
        return call.part
    outs, out = call.args[0], call.args[2]
    return f"merge of {len(outs)}, {out.shape[0]:,} rows"


def _in_turn(calls: Sequence[Call]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _flop(call: Call) -> int:
    """QK and PV: 2 operations each for every pair, query head and number of a head."""
    if not isinstance(call.function, AttentionCall):
        return 0
    num_heads, head_dim = call.args[0].shape[1:]
    return 4 * call.function.pairs * num_heads * head_dim


def _num_bytes(call: Call) -> int:
    """What a kernel must read and write; 0 for attention, whose bound is arithmetic."""
    if call.part == SCORES:
        keys, _, candidates, _ = call.args
        num_heads, head_dim = keys.shape[1:]
        read = num_rows(candidates.spans) * num_heads * head_dim * keys.itemsize
        return read + len(candidates.spans) * num_heads * candidates.max_length * torch.float32.itemsize
    if call.part == SELECT:
        scores, candidates = call.args
        return scores.nbytes + candidates.num_selected * scores.shape[1] * torch.int32.itemsize
    if call.part == PACK:
        _, _, rows, out = call.args
        return rows.nbytes + 2 * out.nbytes
    if call.part == MERGE:
        outs, lses, *written = call.args
        return sum(x.nbytes for x in (*outs, *lses, *written) if x is not None)
    return 0
