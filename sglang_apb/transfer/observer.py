"""What is told of transfers: a line in the log for each request at debug level, and SGLang's metrics."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from sglang_apb import metrics

logger = logging.getLogger(__name__)

WARN_EVERY_S = 1.0


class Cause(Enum):
    """Why a transfer failed, for the metric. The sentence for the client is another thing."""

    LOST = "peer lost"
    MISFIT = "servers do not fit"
    PEER = "given up by the peer"
    GIVEN_UP = "given up here"
    TIMEOUT = "timeout"
    INCOMPLETE = "incomplete"
    ERROR = "error"


class Failure(NamedTuple):
    """`reason` is for the client, `cause` for the metric."""

    reason: str
    cause: Cause = Cause.GIVEN_UP


@dataclass
class Observer:
    """Of one endpoint; `side` is "prefill" or "decode". Safe in any thread."""

    side: str
    with_metrics: bool = False
    _next_warning: float = 0.0
    _num_silent: int = 0

    def ended(self, room: int, num_bytes: int, num_hidden_bytes: int, seconds: float) -> None:
        share = num_hidden_bytes / num_bytes if num_bytes else 0.0
        logger.debug(
            "KV transfer: room %d: %d bytes in %.3f s, %.0f%% of them during prefill",
            *(room, num_bytes, seconds, 100 * share),
        )
        if self.with_metrics:
            metrics.metric("kv_bytes").labels(side=self.side).inc(num_bytes)
            metrics.metric("kv_hidden_bytes").labels(side=self.side).inc(num_hidden_bytes)
            metrics.metric("kv_transfer_seconds").labels(side=self.side).observe(seconds)

    def failed(self, room: int, cause: Cause, reason: str) -> None:
        """Of `room` also when that is no room's number, as a client may have sent it."""
        logger.debug("KV transfer: room %s failed (%s): %s", room, cause.value, reason)
        if self.with_metrics:
            metrics.metric("kv_transfer_failures").labels(side=self.side, cause=cause.value).inc()

    def refused_frame(self, peer: str, why: object) -> None:
        self._warn(peer, why)
        if self.with_metrics:
            metrics.metric("kv_frames_refused").labels(side=self.side).inc()

    def has_peers(self, number: int) -> None:
        if self.with_metrics:
            metrics.metric("kv_peers").labels(side=self.side).set(number)

    def _warn(self, peer: str, why: object) -> None:
        """One line a second at most: a peer that floods us does not flood the log."""
        if time.monotonic() < self._next_warning:
            self._num_silent += 1
            return
        also = f" ({self._num_silent} more since the last such line)" if self._num_silent else ""
        logger.warning("KV transfer: dropped a frame from %s: %s%s", peer, why, also)
        self._next_warning, self._num_silent = time.monotonic() + WARN_EVERY_S, 0
