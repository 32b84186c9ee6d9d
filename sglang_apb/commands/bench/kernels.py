"""`sglang-apb bench kernels`: every kernel and attention call that one rank makes in a layer, each alone.

Rates are shares of what the same device reaches with a large matrix product (TFLOP/s) or a large copy (GB/s). Small
calls that read what is still in the GPU's cache may exceed 100%.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from sglang_apb.commands.bench import bars as bench_bars
from sglang_apb.commands.bench.arguments import add_in_process_arguments, count, model_name
from sglang_apb.commands.bench.table import NO_FIGURE, markdown
from sglang_apb.commands.report import write_result

if TYPE_CHECKING:
    from sglang_apb.commands.bench.calls import Case
    from sglang_apb.commands.bench.setup import InProcess
    from sglang_apb.commands.bench.timing import Ceilings, Stopwatch

HELP = "each kernel and attention call of a layer, against what the device reaches at best"
_SETTINGS = (
    *("lengths", "ranks", "rank", "engine", "dtype", "repeats", "warm_up", "seed"),
    "prefill_backend_config",
)


@dataclass(frozen=True)
class CaseTime:
    """One case's time, and its rate: of FLOPs if it has any, else of bytes."""

    name: str
    length: int
    seconds: float
    flop: int
    num_bytes: int
    share_of_ceiling: float

    @property
    def rate(self) -> str:
        if self.flop:
            return f"{self.flop / self.seconds / 1e12:,.3g} TFLOP/s"
        return f"{self.num_bytes / self.seconds / 1e9:,.3g} GB/s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_in_process_arguments(parser)
    parser.add_argument("--ranks", type=count, default=2, help="that share the prompt; only one's share runs here")
    parser.add_argument("--rank", type=int, help="which one; the one with most attention if left out")


def run(args: argparse.Namespace) -> int:
    from sglang_apb.commands import CommandError
    from sglang_apb.commands.bench.setup import in_process, place
    from sglang_apb.commands.bench.timing import Ceilings, Clock, Stopwatch

    setting = in_process(args)
    if args.rank is not None and not 0 <= args.rank < args.ranks:
        raise CommandError(f"--rank must be from 0 to {args.ranks - 1}, not {args.rank}")
    stopwatch = Stopwatch(Clock(setting.device), setting.repeats, setting.warm_up)
    ceilings = Ceilings.measure(setting.device, setting.dtype, stopwatch)
    times: list[CaseTime] = []
    notes = [ceilings_note(ceilings)]
    for length in args.lengths:
        found, more = time_length(setting, length, args.ranks, args.rank, stopwatch, ceilings)
        times += found
        notes += more
    print("\n".join(["", describe(times), "", *(f"- {note}" for note in notes)]))
    if args.output:
        write_result(
            args.output,
            model=model_name(args),
            settings={name: getattr(args, name) for name in _SETTINGS},
            ceilings=asdict(ceilings),
            notes=notes,
            results=[asdict(time) for time in times],
        )
        print(f"written to {args.output}")
    if args.plot:
        title = f"{model_name(args)}, one of {args.ranks} ranks, {place(setting.device)}"
        bench_bars.write_bars(args.plot, bars(times), "ms", title)
        print(f"drawn in {args.plot}")
    return 0


def time_length(
    setting: InProcess, length: int, num_ranks: int, rank: int | None, stopwatch: Stopwatch, ceilings: Ceilings
) -> tuple[list[CaseTime], list[str]]:
    """All cases of a prompt of `length` tokens, on `rank` or the one with most attention; and what to say of them."""
    from sglang_apb.commands.bench import calls as bench_calls
    from sglang_apb.commands.bench import observed as bench_observed
    from sglang_apb.commands.bench import one_call as bench_one_call

    layout = setting.layout(length, num_ranks)
    if rank is None:
        rank = max(range(num_ranks), key=lambda rank: bench_observed.rank_pairs(layout, rank))
    calls = bench_calls.layer_calls(setting, layout, rank)
    cases = bench_calls.layer_cases(calls)
    if layout.blocks_of(rank):
        cases += [bench_calls.context_case(calls), bench_calls.gather_case(setting, layout, rank, calls.engine)]
    notes = [f"{length:,} tokens: rank {rank} of {num_ranks}, {len(layout.blocks_of(rank))} of its blocks"]
    if setting.engine == "flashinfer":
        one_call, distance = bench_one_call.one_call_cases(calls)
        cases += one_call
        notes += [f"{length:,} tokens: {distance}"] if distance else []
    return [timed(case, length, stopwatch, ceilings) for case in cases], notes


def timed(case: Case, length: int, stopwatch: Stopwatch, ceilings: Ceilings) -> CaseTime:
    seconds = stopwatch.median(case.run)
    work, ceiling = (case.flop, ceilings.flop_per_s) if case.flop else (case.num_bytes, ceilings.bytes_per_s)
    return CaseTime(case.name, length, seconds, case.flop, case.num_bytes, work / seconds / ceiling)


def ceilings_note(ceilings: Ceilings) -> str:
    return (
        f"100% is {ceilings.flop_per_s / 1e12:,.3g} TFLOP/s of a matrix product, "
        f"{ceilings.bytes_per_s / 1e9:,.4g} GB/s of a copy"
    )


def describe(times: Sequence[CaseTime]) -> str:
    """The table: a row a case and length."""
    rows = [
        [
            f"{time.length:,}",
            time.name,
            f"{time.seconds * 1e3:.3f}",
            time.rate if time.flop or time.num_bytes else NO_FIGURE,
            f"{time.share_of_ceiling:.0%}",
        ]
        for time in times
    ]
    return markdown(["tokens", "call", "ms", "rate", "of ceiling"], rows)


def bars(times: Sequence[CaseTime]) -> dict[str, list[tuple[str, float]]]:
    """For each length, the cases and their milliseconds."""
    by_length: dict[str, list[tuple[str, float]]] = {}
    for time in times:
        label = f"{time.name} ({time.share_of_ceiling:.0%})"
        by_length.setdefault(f"{time.length:,} tokens", []).append((label, time.seconds * 1e3))
    return by_length
