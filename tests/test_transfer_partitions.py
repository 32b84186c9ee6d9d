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
from transfer_peers import AUX_LENS, COMPAT, HEADS, make_pages, rows, wait_for

from sglang_apb.transfer.hosts import Address
from sglang_apb.transfer.inbox import ReceiveState
from sglang_apb.transfer.outbox import SendRoom, SendState
from sglang_apb.transfer.receiving import ReceivingEndpoint
from sglang_apb.transfer.sending import SendingEndpoint

POOL_SEED = 1
WAIT_S = 20.0


@pytest.fixture(autouse=True, scope="module")
def _links_can_be_made() -> None:
    if not lossy_link.can_be_made():
        pytest.skip("needs root, `ip` and TUN devices")


@dataclass(frozen=True)
class Outcome:
    """What became of a request on the decode side."""

    state: ReceiveState
    reason: str
    pages: bytes


def decode_server(pipe: Connection, port: int) -> None:
    """Behind the link: opens each room that it is told, and answers with its outcome."""
    lossy_link.enter_namespace()
    pool = make_pages(None)
    receiver = ReceivingEndpoint(pool, make_pages(None, AUX_LENS, 8), COMPAT, HEADS)
    receiver.start()
    pipe.send("there")
    while True:
        number = pipe.recv()
        room = receiver.open(number, [Address(HERE, port)], IDS, 0)
        wait_for(lambda room=room: room.state is not ReceiveState.RECEIVING, WAIT_S)
        pipe.send(Outcome(room.state, room.reason, rows(pool, IDS)))
        receiver.close(room)


@contextmanager
def far_decode_server(link: Link) -> Iterator[tuple[SendingEndpoint, Connection]]:
    with link:
        sender = SendingEndpoint(HERE)
        sender.start_sending(make_pages(POOL_SEED), make_pages(2, AUX_LENS, 8), COMPAT, HEADS)
        try:
            with child(decode_server, sender.port) as (_, pipe):
                assert pipe.poll(30) and pipe.recv() == "there"
                yield sender, pipe
        finally:
            sender.stop()


def start(sender: SendingEndpoint, pipe: Connection, number: int) -> SendRoom:
    room = sender.open(number)
    pipe.send(number)
    assert wait_for(lambda: room.state is SendState.ASKED, WAIT_S)
    return room


def send_all(sender: SendingEndpoint, room: SendRoom) -> None:
    sender.announce(room, [(0, 20)])
    sender.send_pages(room, (0, 20), IDS.copy, range(3))
    sender.finish(room, 0, {})


def outcome(pipe: Connection) -> Outcome:
    assert pipe.poll(2 * WAIT_S), "the decode server hangs"
    found: Any = pipe.recv()
    assert isinstance(found, Outcome)
    return found


def check_is_served(sender: SendingEndpoint, pipe: Connection, number: int) -> None:
    room = start(sender, pipe, number)
    send_all(sender, room)
    found = outcome(pipe)
    assert found.state is ReceiveState.COMPLETE, found.reason
    assert found.pages == rows(make_pages(POOL_SEED), IDS)
    assert wait_for(lambda: room.state is SendState.DONE, WAIT_S)
    sender.close(room)


@pytest.mark.parametrize("stage", ["asked", "sending"])
def test_a_cut_is_noticed_by_both_and_healed_without_a_restart(stage: str) -> None:
    link = Link()
    with far_decode_server(link) as (sender, pipe):
        check_is_served(sender, pipe, 1)
        room = start(sender, pipe, 2)
        if stage == "sending":
            sender.announce(room, [(0, 20)])
            sender.send_pages(room, (0, 20), IDS.copy, [0])
            sender.send_pages(room, (0, 20), IDS.copy, [1], never)
            time.sleep(0.2)
        link.passes = nothing
        cut = time.monotonic()
        assert wait_for(lambda: room.state is SendState.FAILED, PROMISE_S)
        found = outcome(pipe)
        assert time.monotonic() - cut < PROMISE_S
        assert found.state is ReceiveState.FAILED and "Lost the connection" in found.reason
        assert "Lost the connection" in room.reason
        sender.close(room)
        link.passes = everything
        check_is_served(sender, pipe, 3)


def test_a_short_cut_fails_nothing() -> None:
    """TCP sends again what was lost, after 0.2, 0.6 and 1.4 s: before the silence after which a peer counts as gone."""
    link = Link()
    with far_decode_server(link) as (sender, pipe):
        check_is_served(sender, pipe, 1)
        room = start(sender, pipe, 2)
        link.passes = nothing
        send_all(sender, room)
        time.sleep(0.7)
        link.passes = everything
        found = outcome(pipe)
        assert found.state is ReceiveState.COMPLETE, found.reason
        assert found.pages == rows(make_pages(POOL_SEED), IDS)


def test_delay_and_loss_only_take_time() -> None:
    with far_decode_server(Link(delay_s=0.03, loss=0.03, seed=4)) as (sender, pipe):
        for number in range(1, 5):
            check_is_served(sender, pipe, number)
