"""What a server says about how it prefilled a prompt, and what this machine is."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

FIELD = "prefill"


def prefill_report(answer: Any) -> dict[str, Any]:
    """How the prompt of an OpenAI answer, or of a stream's last chunk, was prefilled; {} if it does not say.

    `answer` is the JSON object or the `openai` client's object. Keys: method ("apb" or "exact"), num_ranks,
    num_blocks, attention_share (of exact attention's work, 0 to 1), kv_bytes.
    """
    fields = answer if isinstance(answer, Mapping) else answer.model_dump()
    return dict((fields.get("metadata") or {}).get(FIELD) or {})


def machine() -> dict[str, Any]:
    """The hardware and the versions that a measurement was made with."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpus": gpus,
        "python": platform.python_version(),
        "torch": version("torch"),
        "sglang": version("sglang"),
        "sglang_apb": version("sglang-apb"),
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
