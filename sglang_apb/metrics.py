"""What we add to SGLang's Prometheus endpoint (`--enable-metrics`). `launch/grafana.json` shows it."""

from __future__ import annotations

from functools import cache
from typing import Any

PREFIX = "sglang_apb:"
# name: (kind, what it counts, labels)
METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "prefill_requests": ("Counter", "Prompts prefilled, by the path they took.", ("path",)),
    "kv_bytes": ("Counter", "Bytes of KV in transfers that ended well, by side.", ("side",)),
    "kv_hidden_bytes": ("Counter", "Those of them that were sent before the prefill ended.", ("side",)),
    "kv_transfer_seconds": ("Histogram", "From a request's first byte of KV to its last, by side.", ("side",)),
    "kv_transfer_failures": ("Counter", "Transfers that failed, by side and cause.", ("side", "cause")),
    "kv_frames_refused": ("Counter", "Frames that were damaged, out of bounds or not expected, by side.", ("side",)),
    "kv_peers": ("Gauge", "Ranks of the other side that are connected, by side.", ("side",)),
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "Histogram": {"buckets": (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)},
    "Gauge": {"multiprocess_mode": "livesum"},
}


def count_prefills(path: str, num_requests: int = 1) -> None:
    """Adds prompts whose prefill ended: `path` is how they ran, "apb" or "exact"."""
    metric("prefill_requests").labels(path=path).inc(num_requests)


@cache
def metric(name: str) -> Any:
    """One of METRICS, made at its first use in this process."""
    # Imported late: the client fixes where it keeps its values when it is imported, which SGLang sets before.
    import prometheus_client

    kind, text, labels = METRICS[name]
    options: dict[str, Any] = _OPTIONS.get(kind, {})
    return getattr(prometheus_client, kind)(PREFIX + name, text, labels, **options)
