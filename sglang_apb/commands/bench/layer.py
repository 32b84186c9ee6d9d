"""`sglang-apb bench layer`: where the time of one decoder layer goes, with APB and with exact attention.

A layer of the model's sizes with random weights, run without SGLang: on as many real ranks as there are GPUs (on a
CPU: up to 3), where waiting for a slower rank counts as communication. With more ranks each one's share runs alone, the
slowest counts, and what communication adds is projected from the link's figures. Exact attention is tensor parallel on
the same number of GPUs, all tokens at once. A rank keeps the KV of its own tokens, as on a prefill server.
Times of a whole prefill are those of the layer, times the number of layers, and the output layer's.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from sglang_apb.commands.bench import bars as bench_bars
from sglang_apb.commands.bench import link as bench_link
from sglang_apb.commands.bench.arguments import add_in_process_arguments, counts, model_name
from sglang_apb.commands.bench.link import Link
from sglang_apb.commands.bench.table import NO_FIGURE, markdown
from sglang_apb.commands.report import write_result

if TYPE_CHECKING:
    from sglang_apb.commands.bench.parts import LayerTime
    from sglang_apb.commands.bench.setup import InProcess

HELP = "where one layer's time goes, APB against exact attention, on any number of ranks"
MAX_CPU_RANKS = 3
METHODS = ("apb", "exact")
_SETTINGS = (
    *("lengths", "ranks", "engine", "dtype", "repeats", "warm_up", "seed", "prefill_backend_config"),
    *("row_kernels", "link_gb_s", "link_latency_us", "measure_link"),
)


@dataclass(frozen=True)
class Column:
    """One method's layer with a prompt of `length` on `ranks`; `reason` says why there is no time."""

    method: str
    ranks: int
    length: int
    time: LayerTime | None = None
    reason: str | None = None

    @property
    def name(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{self.method}, {ranks}{' (projected)' if self.time and self.time.is_projected else ''}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_in_process_arguments(parser)
    parser.add_argument("--ranks", type=counts, default=[2], help="numbers of ranks, comma-separated")
    parser.add_argument(
        "--row-kernels", choices=("torch", "sglang"), help="for norms, RoPE and the gate; SGLang's on CUDA if left out"
    )
    parser.add_argument(
        "--link-gb-s",
        type=float,
        default=bench_link.DEFAULT_GB_PER_S,
        help="1e9 bytes a second into a rank, for what is projected; an H200's NVLink if left out",
    )
    parser.add_argument(
        "--link-latency-us", type=float, default=bench_link.DEFAULT_LATENCY_US, help="of one collective"
    )
    parser.add_argument(
        "--measure-link", action="store_true", help="take both from all-gathers over all GPUs (on a CPU: 2 ranks)"
    )


def run(args: argparse.Namespace) -> int:
    from sglang_apb.commands import CommandError
    from sglang_apb.commands.bench.parts import PROJECTED
    from sglang_apb.commands.bench.setup import in_process, place

    setting = in_process(args)
    args.row_kernels = args.row_kernels or ("sglang" if setting.device == "cuda" else "torch")
    setting = replace(setting, row_kernels=args.row_kernels)
    if args.link_gb_s <= 0 or args.link_latency_us < 0:
        raise CommandError("--link-gb-s must be above 0, --link-latency-us at least 0")
    link = Link(args.link_gb_s, args.link_latency_us)
    if args.measure_link:
        link = measured_link(setting)
        args.link_gb_s, args.link_latency_us = link.gb_per_s, link.latency_us
    num_layers = setting.shape.num_layers
    for num_ranks, length in itertools.product(args.ranks, args.lengths):
        setting.layout(length, num_ranks)  # raises before anything is timed
    columns: list[Column] = []
    for num_ranks in args.ranks:
        columns += time_ranks(setting, args.lengths, num_ranks, link)
        if args.output:  # each time: what is measured stays when the run is interrupted
            _write(args, columns, num_layers)
    print(describe(columns, num_layers, link))
    if args.output:
        print(f"written to {args.output}")
    if all(column.time is None for column in columns):
        raise CommandError("no layer could be timed")
    if args.plot:
        title = f"One layer of {model_name(args)}, {place(setting.device)}"
        bench_bars.write_stacks(args.plot, stacks(columns), used_parts(columns), PROJECTED, "ms a layer", title)
        print(f"drawn in {args.plot}")
    return 0


def num_places() -> int:
    """How many ranks can run here at once."""
    import torch

    return torch.cuda.device_count() or MAX_CPU_RANKS


def measured_link(setting: InProcess) -> Link:
    """Of the ranks that can run here. Raises CommandError when there is one only."""
    from sglang_apb.commands import CommandError
    from sglang_apb.commands.bench import parts as bench_parts
    from sglang_apb.commands.bench import ranks as bench_ranks

    num_ranks = num_places() if setting.device == "cuda" else 2
    if num_ranks == 1:
        raise CommandError("--measure-link needs two GPUs: give --link-gb-s and --link-latency-us")
    by_rank = bench_ranks.run_ranks(num_ranks, setting.device, bench_parts.link_times, setting)
    small, large = by_rank[0]
    return Link.fitted(small, large)


def time_ranks(setting: InProcess, lengths: Sequence[int], num_ranks: int, link: Link) -> list[Column]:
    """Both methods at all lengths: on real ranks where they fit, else one share after the other."""
    from sglang_apb.commands.bench.decoder import why_not_shared

    reason = why_not_shared(setting.shape, num_ranks)
    methods = METHODS if reason is None else ("apb",)
    jobs = [(method, length) for length in lengths for method in methods]
    if num_ranks <= num_places():
        columns = _really(setting, jobs, num_ranks)
    else:
        columns = [_projected(setting, method, length, num_ranks, link) for method, length in jobs]
    if reason is not None:
        columns += [Column("exact", num_ranks, length, reason=reason) for length in lengths]
    return columns


def _really(setting: InProcess, jobs: Sequence[tuple[str, int]], num_ranks: int) -> list[Column]:
    """On ranks that run together; when one fails, none of the jobs has a time."""
    import torch

    from sglang_apb.commands import CommandError
    from sglang_apb.commands.bench import parts as bench_parts
    from sglang_apb.commands.bench import ranks as bench_ranks

    _say(f"{num_ranks} rank(s): {len(jobs)} layers")
    torch.cuda.empty_cache()  # rank 0 shares its GPU with this process
    try:
        if num_ranks == 1:
            by_rank = [bench_parts.together(None, setting, jobs)]
        else:
            by_rank = bench_ranks.run_ranks(num_ranks, setting.device, bench_parts.together, setting, jobs)
    except (CommandError, torch.OutOfMemoryError) as error:
        return [Column(method, num_ranks, length, reason=_in_short(error)) for method, length in jobs]
    times = [bench_parts.slowest(same_job) for same_job in zip(*by_rank, strict=True)]
    return [Column(method, num_ranks, length, time) for (method, length), time in zip(jobs, times, strict=True)]


def _projected(setting: InProcess, method: str, length: int, num_ranks: int, link: Link) -> Column:
    import torch

    from sglang_apb.commands.bench import parts as bench_parts

    shares = range(num_ranks) if method == "apb" else range(1)  # with tensor parallelism all do the same
    _say(f"{method}, {length:,} tokens on {num_ranks} ranks: {len(shares)} share(s), one after the other")
    try:
        times = [bench_parts.alone(setting, method, length, rank, num_ranks, link) for rank in shares]
    except torch.OutOfMemoryError as error:
        return Column(method, num_ranks, length, reason=_in_short(error))
    return Column(method, num_ranks, length, bench_parts.slowest(times))


def _in_short(error: Exception) -> str:
    """One line for the table's notes; all of it goes to the terminal."""
    _say(str(error))
    return str(error).strip().splitlines()[-1]


def describe(columns: Sequence[Column], num_layers: int, link: Link) -> str:
    """A table a length, and what is to be said of them."""
    lengths = sorted({column.length for column in columns})
    parts = [layer_table([c for c in columns if c.length == length], length, num_layers) for length in lengths]
    return "\n\n".join(["", *parts, "\n".join(f"- {note}" for note in notes(columns, num_layers, link))])


def layer_table(columns: Sequence[Column], length: int, num_layers: int) -> str:
    """Milliseconds: a row a part, a column a method and number of ranks."""
    times = [column.time for column in columns]
    rows = [[part, *(_ms(time.parts.get(part) if time else None) for time in times)] for part in used_parts(columns)]
    rows.append(["whole layer", *(_ms(time.layer if time else None) for time in times)])
    rows.append(["output layer", *(_ms(time.lm_head if time else None) for time in times)])
    estimates = [_ms(time.prefill(num_layers) if time else None) for time in times]
    rows.append([f"prefill, {num_layers} layers (estimate)", *estimates])
    return markdown([f"ms, {length:,} tokens", *(column.name for column in columns)], rows)


def used_parts(columns: Sequence[Column]) -> list[str]:
    """Parts that any of the columns has, in the table's order."""
    from sglang_apb.commands.bench.parts import OTHER, PARTS, PROJECTED

    parts = (*PARTS, PROJECTED, OTHER)
    return [part for part in parts if any(column.time and part in column.time.parts for column in columns)]


def notes(columns: Sequence[Column], num_layers: int, link: Link) -> Iterator[str]:
    """Lines for what a table cannot show."""
    by_place = {(column.method, column.ranks, column.length): column.time for column in columns}
    for (method, ranks, length), time in by_place.items():
        exact = by_place.get(("exact", ranks, length))
        if method == "apb" and time and exact:
            faster = exact.prefill(num_layers) / time.prefill(num_layers)
            yield f"{length:,} tokens, {ranks} rank(s): exact / apb {faster:.2f}x; apb's slowest rank is {time.rank}"
    for column in columns:
        if column.time and sum(column.time.received):
            yield f"{column.name}, {column.length:,} tokens, over a network: {_over_networks(column.time)}"
    for column in columns:
        if column.reason is not None:
            yield f"{column.name}, {column.length:,} tokens: {column.reason}"
    if any(time and time.is_projected for time in by_place.values()):
        yield (
            "projected: each rank's share was measured alone; what it waits for others is computed for a link of "
            f"{link.gb_per_s:g} GB/s and {link.latency_us:g} us a collective"
        )


def _over_networks(time: LayerTime) -> str:
    """What each speed would add to a layer, in ms, where every rank has a link of its own."""
    speeds = bench_link.NETWORKS_GBIT_PER_S
    waits = [time.exposed(Link(gbit / 8, bench_link.DEFAULT_LATENCY_US)) for gbit in speeds]
    costs = ", ".join(f"{_ms(wait)} ms at {gbit} Gbit/s" for gbit, wait in zip(speeds, waits, strict=True))
    return f"{sum(time.received) / 1e6:,.1f} MB come to a rank a layer, which waits {costs}"


def stacks(columns: Sequence[Column]) -> dict[str, dict[str, dict[str, float]]]:
    """For each length, each method's parts in milliseconds."""
    groups: dict[str, dict[str, dict[str, float]]] = {}
    for column in columns:
        if column.time is not None:
            label = column.name.replace(", ", "\n").replace(" (", "\n(")
            parts = {part: seconds * 1e3 for part, seconds in column.time.parts.items()}
            groups.setdefault(f"{column.length:,} tokens", {})[label] = parts
    return groups


def _write(args: argparse.Namespace, columns: Sequence[Column], num_layers: int) -> None:
    write_result(
        args.output,
        model=model_name(args),
        settings={name: getattr(args, name) for name in _SETTINGS},
        num_layers=num_layers,
        results=[_record(column, num_layers) for column in columns],
    )


def _record(column: Column, num_layers: int) -> dict[str, object]:
    projected = column.time.is_projected if column.time else None
    prefill = column.time.prefill(num_layers) if column.time else None
    return asdict(column) | {"name": column.name, "projected": projected, "prefill_s": prefill}


def _ms(seconds: float | None) -> str:
    return NO_FIGURE if seconds is None else f"{seconds * 1e3:,.3f}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
