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


class EngineError(ValueError):
    """An engine cannot work with this device or dtype; the text says which can."""


def check(name: str, device: str, dtype: torch.dtype) -> None:
    """Raises EngineError when the engine `name` of config.ENGINES does not compute `dtype` on `device`."""
    dtype_name = str(dtype).removeprefix("torch.")
    if name == "flashinfer" and (device != "cuda" or dtype_name not in _FLASHINFER_DTYPES):
        raise EngineError(
            f'"engine": "flashinfer" computes float16 and bfloat16 on CUDA, not {dtype_name} on {device}: use '
            '"engine": "torch", or another --dtype'
        )


def create(name: str) -> AttentionEngine:
    """The engine `name` of config.ENGINES."""
    module, attribute = _ENGINES[name]
    return getattr(import_module(module), attribute)()
