"""Engines that attend, by the name given as `engine` in the configuration; imported when chosen."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from sglang_apb.attention.base import AttentionEngine

_ENGINES = {
    "torch": ("sglang_apb.attention.sdpa", "SdpaEngine"),
    "flashinfer": ("sglang_apb.attention.flashinfer", "FlashInferEngine"),
}
_FLASHINFER_DTYPES = ("float16", "bfloat16")
_FLASHINFER_HEAD_DIMS = (64, 128, 256)


class EngineError(ValueError):
    """An engine cannot work with this model or device; the text says which can."""


def choose(name: str | None, device: str, dtype: torch.dtype, head_dim: int) -> str:
    """`name`, one of config.ENGINES; left out, the fastest that computes heads of `head_dim` numbers here.

    Raises EngineError when the one named does not.
    """
    reason = _why_not_flashinfer(device, str(dtype).removeprefix("torch."), head_dim)
    if name == "flashinfer" and reason:
        raise EngineError(f'"engine": "flashinfer" {reason}: leave it out, or use "torch" or another --dtype')
    return name or ("torch" if reason else "flashinfer")


def _why_not_flashinfer(device: str, dtype: str, head_dim: int) -> str | None:
    if device != "cuda" or dtype not in _FLASHINFER_DTYPES:
        return f"computes {' and '.join(_FLASHINFER_DTYPES)} on CUDA, not {dtype} on {device}"
    if head_dim not in _FLASHINFER_HEAD_DIMS:
        return f"computes heads of {', '.join(map(str, _FLASHINFER_HEAD_DIMS))} numbers, not {head_dim}"
    return None


def create(name: str) -> AttentionEngine:
    """The engine `name` of config.ENGINES."""
    module, attribute = _ENGINES[name]
    return getattr(import_module(module), attribute)()
