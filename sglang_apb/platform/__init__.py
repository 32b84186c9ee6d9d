"""The portable CPU platform: SGLang on any CPU, chosen by SGLang only where the machine has no accelerator."""

from __future__ import annotations

import os


def activate() -> str | None:
    """Entry point of group `sglang.srt.platforms`: our platform's class path, or None to stand aside.

    It stands aside where there is a GPU, and where SGLANG_USE_CPU_ENGINE=1 asks for SGLang's own CPU
    engine (which needs AMX).
    """
    import torch

    accelerated = torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available()
    if accelerated or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    return "sglang_apb.platform.portable_cpu.PortableCpuPlatform"


def is_portable_cpu() -> bool:
    """Whether SGLang runs on this platform in this process."""
    from sglang.srt import platforms

    return type(platforms.current_platform).__name__ == "PortableCpuPlatform"
