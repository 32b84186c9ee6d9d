"""Counters on SGLang's Prometheus endpoint (`--enable-metrics`)."""

from __future__ import annotations

from functools import cache
from typing import Any


def count_prefills(path: str, num_requests: int = 1) -> None:
    """Adds prompts whose prefill ended: `path` is how they ran, "apb" or "exact"."""
    _prefills().labels(path=path).inc(num_requests)


@cache
def _prefills() -> Any:
    # Imported late: the client fixes where it keeps its values when it is imported, which SGLang sets before.
    from prometheus_client import Counter

    return Counter("sglang_apb:prefill_requests", "Prompts prefilled, by the path they took.", ["path"])
