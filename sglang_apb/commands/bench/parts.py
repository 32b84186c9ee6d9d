"""Times of one decoder layer's parts, with APB and with exact attention: together on ranks, or a rank's share alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from sglang_apb import attention, selection
from sglang_apb.attention.base import Piece
from sglang_apb.backends.layer_rows import LayerRows
from sglang_apb.backends.sparse_attention import SparseAttention
from sglang_apb.commands.bench.decoder import FFN, KV_CACHE, NORMS, PROJECTIONS, Attend, DecoderLayer, Reduce
from sglang_apb.commands.bench.link import Link, apb_exposed, exact_exposed
from sglang_apb.commands.bench.observed import (
    BEFORE,
    COMMUNICATION,
    MERGE,
    OWN,
    PACK,
    QUESTION,
    QUESTION_ITSELF,
    SCORES,
    SELECT,
    ObservedEngine,
    ObservedGroup,
    ObservedSelector,
    StandInGroup,
)
from sglang_apb.commands.bench.row_ops import row_ops
from sglang_apb.commands.bench.setup import InProcess
from sglang_apb.commands.bench.timing import Clock, Observe, Recorder, Stopwatch, unobserved
from sglang_apb.layout import Span, num_rows
from sglang_apb.rank_group import RankGroup

APB, EXACT = "apb", "exact"
PROJECTED, OTHER = "communication, projected", "other"
# What the observed calls are counted as, in the order of the table.
PARTS = {
    PROJECTIONS: (PROJECTIONS,),
    NORMS: (NORMS,),
    KV_CACHE: (KV_CACHE,),
    "scores and selection": (SCORES, SELECT),
    "packing": (PACK,),
    COMMUNICATION: (COMMUNICATION,),
    "attention, own": (OWN,),
    "attention, before": (BEFORE,),
    "attention, question": (QUESTION, QUESTION_ITSELF),
    "merge": (MERGE,),
    FFN: (FFN,),
}


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one rank's layer as a whole, and of its parts (PARTS, PROJECTED, OTHER), which add up to it.

    The part PROJECTED, where it is, is computed from a link's figures, not measured; `layer` has it in it. `received`:
    bytes that each of APB's collectives brings from other ranks.
    """

    rank: int
    layer: float
    parts: dict[str, float]
    lm_head: float
    received: tuple[int, ...] = ()

    @property
    def is_projected(self) -> bool:
        """Whether the ranks did not really speak to each other."""
        return PROJECTED in self.parts

    def exposed(self, link: Link) -> float:
        """Seconds for which APB's layer would wait for other ranks over `link`."""
        own, before = (self.parts.get(part, 0.0) for part in ("attention, own", "attention, before"))
        return apb_exposed(self.received, own, before, link)

    def prefill(self, num_layers: int) -> float:
        """Seconds of the whole model, if all layers take as long."""
        return num_layers * self.layer + self.lm_head


# Gives one layer's attention; what there is to see of it, `observe` sees.
MakeAttend = Callable[[Observe | None], Attend]


def _nothing(*_: Any) -> None:
    """What a rank alone does in place of summing and of waiting for the others."""


@dataclass(frozen=True)
class Company:
    """Who runs a layer along: real ranks, none, or stand-ins."""

    ranks: RankGroup
    reduce: Reduce = _nothing
    line_up: Callable[[], Any] = _nothing

    @classmethod
    def of(cls, group: Any) -> Company:
        """The ranks of a process group; None is one rank."""
        if group is None:
            return cls(RankGroup())
        return cls(RankGroup(group), partial(dist.all_reduce, group=group), partial(dist.barrier, group))


def together(group: Any, setting: InProcess, jobs: Sequence[tuple[str, int]]) -> list[LayerTime]:
    """This rank's times for jobs (method, prompt tokens) that the ranks of `group` run together."""
    company = Company.of(group)
    return [_METHODS[method](setting, num_tokens, company) for method, num_tokens in jobs]


def alone(setting: InProcess, method: str, num_tokens: int, rank: int, num_ranks: int, link: Link) -> LayerTime:
    """The time of `rank`'s share without the other ranks, plus what communication would add over `link`."""
    ranks = StandInGroup(rank, num_ranks)
    time = _METHODS[method](setting, num_tokens, Company(ranks))
    if method == EXACT:
        added = exact_exposed(num_tokens, setting.shape.hidden, setting.dtype.itemsize, num_ranks, link)
    else:
        added = time.exposed(link)
    parts = {part: seconds for part, seconds in time.parts.items() if part != OTHER}
    return replace(time, layer=time.layer + added, parts=parts | {PROJECTED: added, OTHER: time.parts[OTHER]})


def link_times(group: Any, setting: InProcess) -> list[tuple[float, float]]:
    """(bytes from other ranks, seconds) of a small and a large all-gather over the ranks of `group`."""
    company = Company.of(group)
    stopwatch = Stopwatch(Clock(setting.device), setting.repeats, setting.warm_up, company.line_up)
    times: list[tuple[float, float]] = []
    for num_bytes in (2**20, 2**26 if setting.device == "cuda" else 2**24):
        rows = torch.zeros(num_bytes, dtype=torch.uint8, device=setting.device)
        gathered = rows.new_empty(company.ranks.size * num_bytes)
        gather = partial(dist.all_gather_single, gathered, rows, group=group)
        times.append(((company.ranks.size - 1) * num_bytes, stopwatch.median(gather)))
    return times


def slowest(times: Iterable[LayerTime]) -> LayerTime:
    """The others wait for this one."""
    return max(times, key=lambda time: time.layer)


def _apb(setting: InProcess, num_tokens: int, company: Company) -> LayerTime:
    ranks = company.ranks
    layout = setting.layout(num_tokens, ranks.size)
    engine, selector = attention.create(setting.engine), selection.create(setting.config.selector)
    received: list[int] = []

    def make(observe: Observe | None) -> Attend:
        if observe is None:
            return SparseAttention(layout, ranks, engine, selector, setting.device).attend
        shown = ObservedSelector(selector, engine.kernels, observe)
        group = ObservedGroup(ranks, observe)
        sparse = SparseAttention(layout, group, ObservedEngine(engine, observe), shown, setting.device)

        def attend_and_count(rows: LayerRows) -> torch.Tensor:
            group.received.clear()
            out = sparse.attend(rows)
            received[:] = group.received
            return out

        return attend_and_count

    time = _time(setting, layout.rows_of(ranks.rank).positions, 1, replace(company, reduce=_nothing), make)
    return replace(time, received=tuple(received))


def _exact(setting: InProcess, num_tokens: int, company: Company) -> LayerTime:
    """Tensor parallel, as SGLang: every rank has all tokens, and its share of heads and of the FFN."""
    engine = attention.create(setting.engine)

    def make(observe: Observe | None) -> Attend:
        (attend,) = engine.plan([[Piece(num_tokens, Span(0, num_tokens), causal=True)]])
        see = observe or unobserved
        return lambda rows: see(OWN, attend, rows.q, rows.k, rows.v, rows.scale).out

    return _time(setting, [Span(0, num_tokens)], company.ranks.size, company, make)


_METHODS: dict[str, Callable[[InProcess, int, Company], LayerTime]] = {APB: _apb, EXACT: _exact}


def _time(
    setting: InProcess, positions: Sequence[Span], num_shares: int, company: Company, make: MakeAttend
) -> LayerTime:
    """Times the layer over rows at `positions`: as a whole without the recorder, then its parts with it."""
    torch.manual_seed(setting.seed)
    shape, count = setting.shape, num_rows(positions)
    layer = DecoderLayer(setting, count, num_shares, company.reduce)
    hidden, residual = torch.randn(2, count, shape.hidden, device=setting.device, dtype=setting.dtype)
    turns = torch.cat([torch.arange(span.start, span.end, device=setting.device) for span in positions])
    rotation = row_ops(setting.row_kernels).rotation(turns, shape.head_dim, setting.dtype)

    def layer_with(observe: Observe | None) -> Callable[[], Any]:
        attend = make(observe)
        return lambda: layer(hidden, residual, rotation, attend, observe or unobserved)

    clock = Clock(setting.device)
    stopwatch = Stopwatch(clock, setting.repeats, setting.warm_up, company.line_up)
    whole = stopwatch.median(layer_with(None))
    recorder = Recorder(clock)
    parts = _sums(stopwatch.median_parts(layer_with(recorder), recorder))
    lm_head = _lm_head_seconds(setting, hidden, num_shares, stopwatch)
    return LayerTime(company.ranks.rank, whole, parts | {OTHER: whole - sum(parts.values())}, lm_head)


def _sums(seen: Mapping[str, float]) -> dict[str, float]:
    """Seconds of the parts that were seen, in the order of PARTS."""
    return {
        part: sum(seen.get(call, 0.0) for call in calls)
        for part, calls in PARTS.items()
        if not seen.keys().isdisjoint(calls)
    }


def _lm_head_seconds(setting: InProcess, hidden: torch.Tensor, num_shares: int, stopwatch: Stopwatch) -> float:
    """The output layer for the last row: this rank's share of the vocabulary."""
    num_words = -(-setting.shape.vocab // num_shares)
    weight = torch.randn(num_words, setting.shape.hidden, device=setting.device, dtype=setting.dtype)
    return stopwatch.median(lambda: F.linear(hidden[-1:], weight))
