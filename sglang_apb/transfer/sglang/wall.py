"""Between SGLang's scheduler and one request's transfer: an error of ours ends that request, and nothing else."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from sglang.srt.disaggregation.common.conn import KVTransferError

from sglang_apb.transfer.observer import Cause

logger = logging.getLogger(__name__)

_ERROR = "The KV transfer failed on an error in this server"

C = TypeVar("C", bound=type)


class Transfer(Protocol):
    """Of one request, on one rank."""

    bootstrap_room: int

    def _fail(self, reason: str, cause: Cause) -> None: ...


@contextlib.contextmanager
def fails_alone(transfer: Transfer) -> Iterator[None]:
    """Whatever is raised inside fails `transfer`; KVTransferError, by which SGLang is told of failures, goes on."""
    try:
        yield
    except KVTransferError:
        raise
    except Exception as error:
        logger.exception("KV transfer: an error in this server ends room %s", transfer.bootstrap_room)
        try:
            transfer._fail(f"{_ERROR}: {error!r:.500}", Cause.ERROR)
        except Exception:  # half made, or broken: `poll` says all the same that it has failed
            logger.exception("KV transfer: a room that had failed could not be closed")


def walled(*names: str, **otherwise: Any) -> Callable[[C], C]:
    """Puts the methods that SGLang's scheduler calls behind a wall: one that fails gives None, or what `otherwise` says
    of it, and the request's next `poll` that it has failed. SGLang's ranks agree on what they have polled.
    `failure_exception` raises KVTransferError in any case.
    """

    def build(cls: C) -> C:
        for name in (*names, *otherwise):
            setattr(cls, name, _behind_wall(getattr(cls, name), otherwise.get(name)))
        cls.failure_exception = _sure_to_raise(_behind_wall(cls.failure_exception, None))  # type: ignore[attr-defined]
        return cls

    return build


def _behind_wall(method: Callable[..., Any], otherwise: Any) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Transfer, *args: Any, **kwargs: Any) -> Any:
        with fails_alone(self):
            return method(self, *args, **kwargs)
        return otherwise

    return call


def _sure_to_raise(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Transfer) -> None:
        method(self)
        raise KVTransferError(int(self.bootstrap_room), f"{_ERROR}: see its log.")

    return call
