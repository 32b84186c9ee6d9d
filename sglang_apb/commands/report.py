"""What a server says about how it prefilled a prompt, what this machine is, and the file a result is kept in."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

FIELD = "prefill"


def prefill_report(answer: Any) -> dict[str, Any]:
    """How the prompt of an answer, or of a stream's last chunk, was prefilled; {} if it does not say.

    `answer` is the JSON object of OpenAI's API or of `/generate`, or the `openai` client's object. Keys: method
    ("apb" or "exact"), num_ranks, num_blocks, attention_share (of exact attention's work, 0 to 1); with
    disaggregation kv_bytes, how many of them were sent before the prefill ended (kv_bytes_hidden), and how
    (kv_data_plane).
    """
    fields = answer if isinstance(answer, Mapping) else answer.model_dump()
    return dict((fields.get("metadata") or fields.get("meta_info") or {}).get(FIELD) or {})


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


def write_result(path: Path, *, model: str | None, settings: Mapping[str, Any], **content: Any) -> None:
    """Writes a measurement as JSON, with the date, this machine and `settings` in front of `content`.

    Of a model folder only the name is kept: where it stands says nothing to others.
    """
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": machine(),
        "model": Path(model).name if model else None,
        "settings": dict(settings),
        **content,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
