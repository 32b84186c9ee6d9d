"""Which planes a server has: `data_plane` of `--kv-transfer-config`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from sglang_apb.transfer.planes.base import OpenSend, Pool
from sglang_apb.transfer.planes.pair import ReceivePlanes
from sglang_apb.transfer.planes.table import AUTO, PLANES, ZMQ
from sglang_apb.transfer.planes.zmq import ZmqSend
from sglang_apb.transfer.protocol.config import TransferConfig


def send_planes(pool: Pool, config: TransferConfig) -> list[OpenSend]:
    """A prefill rank's, the best first. Raises ValueError when the setting asks for what is not possible."""
    halves = [module.send_half(pool, config) for module in _modules()]
    return [half for half in halves if half is not None] + [lambda side: ZmqSend()]


def receive_planes(pool: Pool, config: TransferConfig) -> ReceivePlanes:
    """A decode rank's. Raises ValueError when the setting asks for what is not possible."""
    halves = [module.receive_half(pool, config) for module in _modules()]
    return ReceivePlanes(tuple(half for half in halves if half is not None), zmq_too=config.plane in (AUTO, ZMQ))


def _modules() -> Iterator[Any]:
    for plane in PLANES.values():
        yield import_module(f"{__package__}.{plane.module}")
