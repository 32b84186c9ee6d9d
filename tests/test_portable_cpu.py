"""The portable CPU platform: what it chooses when nobody says."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from sglang.srt.platforms import current_platform  # noqa: F401  (SGLang finds our platform; it must be the first to)
from sglang_apb.patches import portable_cpu as patch_module

from sglang_apb.platform import portable_cpu


def resolved_dtype(monkeypatch: pytest.MonkeyPatch, *, has_bfloat16: bool, given: str) -> str:
    monkeypatch.setattr(portable_cpu, "has_bfloat16", lambda: has_bfloat16)
    monkeypatch.setattr(portable_cpu, "_share_cores", lambda num_ranks: None)
    monkeypatch.setenv("SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX", "0")
    args = SimpleNamespace(
        attention_backend="intel_amx",
        dtype=given,
        mem_fraction_static=None,
        max_total_tokens=None,
        tp_size=1,
        disaggregation_decode_retraction_backup=None,
    )
    portable_cpu.PortableCpuPlatform().apply_server_args_defaults(args)
    return args.dtype


@pytest.mark.parametrize(
    ("has_bfloat16", "given", "dtype"),
    [(False, "auto", "float32"), (True, "auto", "auto"), (False, "bfloat16", "bfloat16")],
)
def test_a_cpu_without_bfloat16_computes_in_float32_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool, given: str, dtype: str
) -> None:
    assert resolved_dtype(monkeypatch, has_bfloat16=has_bfloat16, given=given) == dtype


@pytest.mark.parametrize(("is_idle", "pauses"), [(True, 0), (False, 1)])
def test_a_scheduler_that_waits_for_kv_leaves_the_core_to_others(
    monkeypatch: pytest.MonkeyPatch, is_idle: bool, pauses: int
) -> None:
    """One that is idle has slept in SGLang's own poll already."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    (hook,) = (patch.hook for patch in patch_module.PATCHES if patch.target.endswith("on_idle"))
    hook(None, SimpleNamespace(is_fully_idle=lambda: is_idle))
    assert len(slept) == pauses
