"""A decode server on another machine, as far as the network can tell, behind a link that is cut, slow or lossy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import lossy_link
import pytest
from lossy_link import HERE, Link, everything, nothing
from test_transfer_faults import IDS, PROMISE_S, child, never
from transfer_peers import AUX_LENS, COMPAT, HEADS, decode_endpoint, make_pages, rows, start_sending, wait_for

from sglang_apb.transfer.decode.request import RequestState
from sglang_apb.transfer.prefill.endpoint import PrefillEndpoint
from sglang_apb.transfer.prefill.transfer import Transfer, TransferState
from sglang_apb.transfer.protocol.hosts import Address

POOL_SEED = 1
WAIT_S = 20.0


@pytest.fixture(autouse=True, scope="module")
def _links_can_be_made() -> None:
    if not lossy_link.can_be_made():
        pytest.skip("needs root, `ip` and TUN devices")


@dataclass(frozen=True)
class Outcome:
    """What became of a request on the decode side."""

    state: RequestState
    reason: str
    pages: bytes


def decode_server(pipe: Connection, port: int) -> None:
    """Behind the link: opens each room that it is told, and answers with its outcome."""
    lossy_link.enter_namespace()
    pool = make_pages(None)
    receiver = decode_endpoint(pool, make_pages(None, AUX_LENS, 8), COMPAT, HEADS)
    receiver.start()
    pipe.send("there")
    while True:
        number = pipe.recv()
        request = receiver.open(number, [Address(HERE, port)], IDS, 0)
        wait_for(lambda request=request: request.state is not RequestState.RECEIVING, WAIT_S)
        pipe.send(Outcome(request.state, request.reason, rows(pool, IDS)))
        receiver.close(request)


@contextmanager
def far_decode_server(link: Link) -> Iterator[tuple[PrefillEndpoint, Connection]]:
    with link:
        sender = PrefillEndpoint(HERE)
        start_sending(sender, make_pages(POOL_SEED), make_pages(2, AUX_LENS, 8), COMPAT, HEADS)
        try:
            with child(decode_server, sender.port) as (_, pipe):
                assert pipe.poll(30) and pipe.recv() == "there"
                yield sender, pipe
        finally:
            sender.stop()


def start(sender: PrefillEndpoint, pipe: Connection, number: int) -> Transfer:
    transfer = sender.open(number)
    pipe.send(number)
    assert wait_for(lambda: transfer.state is TransferState.ASKED, WAIT_S)
    return transfer


def send_all(sender: PrefillEndpoint, transfer: Transfer) -> None:
    sender.announce(transfer, [(0, 20)])
    sender.send_pages(transfer, (0, 20), IDS.copy, range(3))
    sender.finish(transfer, 0, {})


def outcome(pipe: Connection) -> Outcome:
    assert pipe.poll(2 * WAIT_S), "the decode server hangs"
    found: Any = pipe.recv()
    assert isinstance(found, Outcome)
    return found


def check_is_served(sender: PrefillEndpoint, pipe: Connection, number: int) -> None:
    transfer = start(sender, pipe, number)
    send_all(sender, transfer)
    found = outcome(pipe)
    assert found.state is RequestState.COMPLETE, found.reason
    assert found.pages == rows(make_pages(POOL_SEED), IDS)
    assert wait_for(lambda: transfer.state is TransferState.DONE, WAIT_S)
    sender.close(transfer)


@pytest.mark.parametrize("stage", ["asked", "sending"])
def test_a_cut_is_noticed_by_both_and_healed_without_a_restart(stage: str) -> None:
    link = Link()
    with far_decode_server(link) as (sender, pipe):
        check_is_served(sender, pipe, 1)
        transfer = start(sender, pipe, 2)
        if stage == "sending":
            sender.announce(transfer, [(0, 20)])
            sender.send_pages(transfer, (0, 20), IDS.copy, [0])
            sender.send_pages(transfer, (0, 20), IDS.copy, [1], never)
            time.sleep(0.2)
        link.passes = nothing
        cut = time.monotonic()
        assert wait_for(lambda: transfer.state is TransferState.FAILED, PROMISE_S)
        found = outcome(pipe)
        assert time.monotonic() - cut < PROMISE_S
        assert found.state is RequestState.FAILED and "Lost the connection" in found.reason
        assert "Lost the connection" in transfer.reason
        sender.close(transfer)
        link.passes = everything
        check_is_served(sender, pipe, 3)


def test_a_short_cut_fails_nothing() -> None:
    """TCP sends again what was lost, after 0.2, 0.6 and 1.4 s: before the silence after which a peer counts as gone."""
    link = Link()
    with far_decode_server(link) as (sender, pipe):
        check_is_served(sender, pipe, 1)
        transfer = start(sender, pipe, 2)
        link.passes = nothing
        send_all(sender, transfer)
        time.sleep(0.7)
        link.passes = everything
        found = outcome(pipe)
        assert found.state is RequestState.COMPLETE, found.reason
        assert found.pages == rows(make_pages(POOL_SEED), IDS)


def test_delay_and_loss_only_take_time() -> None:
    with far_decode_server(Link(delay_s=0.03, loss=0.03, seed=4)) as (sender, pipe):
        for number in range(1, 5):
            check_is_served(sender, pipe, number)
