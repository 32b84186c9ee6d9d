"""What `bench ttft` compares APB with: the ways in which plain SGLang can prefill a long prompt on these GPUs.

A way has the name of its attention backend, tensor parallel on several GPUs. `fa3-cp` is fa3 with SGLang's own
context parallelism: ranks share a prompt's attention, and the feed-forward layers stay tensor parallel.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from sglang_apb.commands import CommandError
from sglang_apb.commands.servers import num_gpus

# SGLang takes flashinfer with context parallelism, too, but only fa3 has code for it here.
FA3_CP = "fa3-cp"
# Of the models that APB serves. SGLang starts with the others as well, but they cut heads by the full tp_size while
# the KV pool has all of them (models/llama.py, models/qwen2.py).
_CP_FAMILIES = ("Qwen3ForCausalLM",)
# GPUs that sgl_kernel's FlashAttention 3 is built for, by the major number of their compute capability.
_FA3_CAPABILITIES = (8, 9)


def default_backends(gpus: int, architecture: str) -> list[str]:
    """The ways that are worth comparing with on `gpus` GPUs of this machine."""
    if not num_gpus():
        return ["torch_native"]
    if not _has_fa3():
        return ["flashinfer"]
    return ["flashinfer", "fa3", *([FA3_CP] if _cp_refusal(gpus, architecture) is None else [])]


def check_backends(backends: Sequence[str], gpus: int, architecture: str) -> None:
    """Refuses what SGLang would start and not compute. Raises CommandError with one sentence."""
    refusal = _cp_refusal(gpus, architecture)
    if FA3_CP in backends and refusal is not None:
        raise CommandError(f"--backends {FA3_CP} {refusal}; leave it out")


def attention_backend(backend: str) -> str:
    """SGLang's name."""
    return "fa3" if backend == FA3_CP else backend


def parallel_arguments(backend: str, gpus: int) -> list[str]:
    """For a server whose ranks together are one way."""
    arguments = ["--attention-backend", attention_backend(backend), "--tp-size", str(gpus)]
    if backend == FA3_CP:
        arguments += ["--attn-cp-size", str(gpus), "--enable-prefill-cp", "--cp-strategy", "zigzag"]
    return arguments


def _cp_refusal(gpus: int, architecture: str) -> str | None:
    if not num_gpus() or gpus < 2:
        return "needs two GPUs or more: ranks share a prompt"
    if architecture not in _CP_FAMILIES:
        return (
            f"does not go with {architecture}: SGLang's context parallelism supports, of APB's models, only "
            f"{', '.join(_CP_FAMILIES)}, and cuts the others' heads by the full --tp-size"
        )
    return None


def _has_fa3() -> bool:
    """Whether the FlashAttention 3 library is there and made for these GPUs.

    SGLang's own question imports sgl_kernel, which loads every kernel library.
    """
    import torch

    spec = find_spec("sgl_kernel")
    folders = (spec.submodule_search_locations or []) if spec else []
    is_there = any(next(Path(folder).glob("flash_ops*.so"), None) for folder in folders)
    return is_there and torch.cuda.get_device_capability()[0] in _FA3_CAPABILITIES
