"""What kinds of bench without a server measure: a model's sizes, an engine, a device."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from sglang_apb import attention
from sglang_apb.commands import CommandError
from sglang_apb.commands.bench import plot as bench_plot
from sglang_apb.commands.bench.models import SHAPES, DecoderShape, read_config
from sglang_apb.config import ApbConfig, ConfigError, parse
from sglang_apb.layout import Layout, LayoutError, plan


@dataclass(frozen=True)
class InProcess:
    """What is measured without a server. Plain values, so that it travels to the processes of ranks."""

    shape: DecoderShape
    config: ApbConfig
    engine: str
    device: str  # "cuda" or "cpu"
    dtype: torch.dtype
    repeats: int
    warm_up: int
    seed: int
    row_kernels: str = "torch"  # of row_ops.ROW_KERNELS

    def layout(self, num_tokens: int, num_ranks: int) -> Layout:
        """Raises CommandError when a prompt of `num_tokens` cannot be laid out."""
        try:
            return plan(num_tokens, self.config, num_ranks=num_ranks)
        except LayoutError as error:
            raise CommandError(f"--lengths {num_tokens}: {error}") from error


def in_process(args: argparse.Namespace) -> InProcess:
    """Fills in what depends on this machine, and refuses at once what would fail later. Raises CommandError."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = DecoderShape.of(read_config(args.model) if args.model else SHAPES[args.shape])
    if shape is None:
        raise CommandError(f"--model {args.model} is of a family that APB does not serve: see the README's list")
    if args.warm_up < 0:
        raise CommandError(f"--warm-up must be at least 0, not {args.warm_up}")
    if args.plot:
        bench_plot.check(args.plot)
    args.dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    try:
        config = parse(args.prefill_backend_config)
        args.engine = attention.choose(args.engine or config.engine, device, getattr(torch, args.dtype), shape.head_dim)
    except (ConfigError, attention.EngineError) as error:
        raise CommandError(str(error)) from error
    if config.order != "one_pass":
        raise CommandError('"order": "two_pass" is not measured here: leave it out')
    return InProcess(
        shape, config, args.engine, device, getattr(torch, args.dtype), args.repeats, args.warm_up, args.seed
    )


def place(device: str) -> str:
    """What it ran on, for titles."""
    return torch.cuda.get_device_name(0) if device == "cuda" else "CPU"
