"""Peers in processes of their own that are killed or stopped: noticed within 5 s, and nobody else is held up."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import pytest
from transfer_peers import (
    AUX_LENS,
    COMPAT,
    HEADS,
    ITEM_LENS,
    Cluster,
    asked,
    cluster,
    decode_endpoint,
    make_pages,
    received,
    rows,
    start_sending,
    wait_for,
)

from sglang_apb.transfer.decode.request import DecodeRequest, RequestState
from sglang_apb.transfer.observer import Cause, Failure
from sglang_apb.transfer.prefill.endpoint import PrefillEndpoint
from sglang_apb.transfer.prefill.transfer import Transfer, TransferState

PROMISE_S = 5.0
IDS = np.arange(40, 60)
FAULTS = (signal.SIGKILL, signal.SIGSTOP)


def never() -> bool:
    return False


# children


def decode_server(pipe: Connection, port: int, stage: str) -> None:
    """Expects room 1, or asks for it."""
    receiver = decode_endpoint(make_pages(None), make_pages(None, AUX_LENS, 8), COMPAT, HEADS)
    receiver.start()
    if stage == "expected":
        receiver.expect(1, [("127.0.0.1", port)], print)
    else:
        receiver.open(1, [("127.0.0.1", port)], IDS, 0)
    pipe.send("there")
    pipe.recv()


def announce_room_1(pipe: Connection) -> tuple[PrefillEndpoint, Transfer]:
    """A prefill server that has been asked for room 1, and has announced its pages."""
    sender = PrefillEndpoint("127.0.0.1")
    start_sending(sender, make_pages(1), make_pages(2, AUX_LENS, 8), COMPAT, HEADS)
    transfer = sender.open(1)
    pipe.send(sender.port)
    while not asked(transfer):
        pass
    sender.announce(transfer, [(0, 20)])
    return sender, transfer


def prefill_server(pipe: Connection) -> None:
    """Sends room 1's first layer when it is asked; goes on with the others when told to."""
    sender, transfer = announce_room_1(pipe)
    sender.send_pages(transfer, (0, 20), IDS.copy, [0])
    pipe.recv()
    sender.send_pages(transfer, (0, 20), IDS.copy, [1, 2])
    sender.finish(transfer, 0, {})
    pipe.send("sent")
    pipe.recv()


def prefill_server_in_pieces(pipe: Connection) -> None:
    """Sends room 1 in more frames than a decode server takes before it has looked at any."""
    sender, transfer = announce_room_1(pipe)
    for page in range(20):
        sender.send_pages(transfer, (page, page + 1), IDS[page : page + 1].copy, range(3))
    pipe.recv()


def busy_decode_server(pipe: Connection, port: int) -> None:
    """Its transfer thread has no time for 6 s when it has asked for room 1; then it says what became of that."""
    receiver = decode_endpoint(make_pages(None), make_pages(None, AUX_LENS, 8), COMPAT, HEADS)
    receiver.start()
    request = receiver.open(1, [("127.0.0.1", port)], IDS, 0)
    receiver.call(partial(time.sleep, 6))
    pipe.send("busy")
    wait_for(lambda: request.state is not RequestState.RECEIVING, 3 * PROMISE_S)
    pipe.send((request.state, request.reason))
    pipe.recv()


@contextlib.contextmanager
def child(target: Callable[..., None], *args: Any) -> Iterator[tuple[BaseProcess, Connection]]:
    context = multiprocessing.get_context("spawn")
    pipe, its_end = context.Pipe()
    process = context.Process(target=target, args=(its_end, *args), daemon=True)
    process.start()
    try:
        yield process, pipe
    finally:
        process.kill()
        process.join()


def strike(process: BaseProcess, fault: signal.Signals) -> None:
    assert process.pid is not None
    os.kill(process.pid, fault)


def check_others_go_on(peers: Cluster, room_id: int) -> None:
    decode, transfer = peers.ask(room_id, IDS), peers.senders[0].open(room_id)
    assert asked(transfer), transfer.reason
    peers.senders[0].announce(transfer, [(0, 20)])
    peers.senders[0].send_pages(transfer, (0, 20), IDS.copy, range(3))
    peers.senders[0].finish(transfer, 0, {})
    assert received(decode), decode.reason
    assert rows(peers.pool, IDS) == rows(peers.pools[0], IDS)
    peers.receiver.close(decode)
    peers.senders[0].close(transfer)


# a decode server


def send_until(stage: str, sender: PrefillEndpoint, transfer: Transfer) -> None:
    if stage in ("expected", "asked"):
        return
    sender.announce(transfer, [(0, 20)])
    sender.send_pages(transfer, (0, 20), IDS.copy, [0])
    if stage == "sending":
        sender.send_pages(transfer, (0, 20), IDS.copy, [1], never)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", ["expected", "asked", "sending", "sent"])
def test_a_decode_server_that_dies_is_noticed(stage: str, fault: signal.Signals) -> None:
    with cluster() as peers:
        sender = peers.senders[0]
        transfer = sender.open(1)
        with child(decode_server, sender.port, stage) as (process, pipe):
            assert pipe.poll(30) and pipe.recv() == "there"
            assert wait_for(lambda: transfer.peer != b"")
            if stage != "expected":
                assert asked(transfer)
            send_until(stage, sender, transfer)
            if stage == "sent":  # it cannot say any more that it has got everything
                os.kill(process.pid or 0, signal.SIGSTOP)
                sender.send_pages(transfer, (0, 20), IDS.copy, [1, 2])
                sender.finish(transfer, 0, {})
                assert wait_for(lambda: transfer.num_bytes == 20 * sum(ITEM_LENS))
            strike(process, fault)
            check_others_go_on(peers, 2)
            assert wait_for(lambda: transfer.state is TransferState.FAILED, PROMISE_S)
            assert "Lost the connection to the decode server" in transfer.reason
            assert not transfer.has_more
            check_others_go_on(peers, 3)
            sender.close(transfer)
            check_others_go_on(peers, 4)


def test_decode_servers_that_stop_at_any_time_between_two_pings_are_noticed() -> None:
    """Later than in their first second, when ZMQ watches them."""
    with cluster() as peers, contextlib.ExitStack() as stack:
        sender = peers.senders[0]
        started = [stack.enter_context(child(decode_server, sender.port, "expected")) for _ in range(4)]
        assert all(pipe.poll(60) and pipe.recv() == "there" for _, pipe in started)
        assert wait_for(lambda: len(sender._peers) == 4)
        time.sleep(2.5)
        for process, _ in started:
            strike(process, signal.SIGSTOP)
            time.sleep(0.23)
        assert wait_for(lambda: len(sender._peers) == 0, PROMISE_S)


def test_a_request_that_comes_after_its_decode_server_died_fails_at_once() -> None:
    with cluster() as peers, child(decode_server, peers.senders[0].port, "expected") as (process, pipe):
        assert pipe.poll(30) and pipe.recv() == "there"
        assert wait_for(lambda: (1, 0) in peers.senders[0].transfers._notices)
        strike(process, signal.SIGKILL)
        assert wait_for(lambda: peers.senders[0].transfers._notices[1, 0].reason != "", PROMISE_S)
        transfer = peers.senders[0].open(1)
        assert wait_for(lambda: transfer.state is TransferState.FAILED, 1) and transfer.cause is Cause.LOST


# a prefill server


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", ["expected", "asked", "receiving"])
def test_a_prefill_rank_that_dies_is_noticed(stage: str, fault: signal.Signals) -> None:
    """It is one of two; the other one lives, and answers for its part."""
    lost: list[Failure] = []
    with cluster() as peers, child(prefill_server) as (process, pipe):
        assert pipe.poll(30)
        ranks = [("127.0.0.1", pipe.recv()), *peers.addresses]
        other = peers.senders[0].open(1)
        request: DecodeRequest | None = None
        if stage == "expected":
            peers.receiver.expect(1, ranks, lost.append)
            assert wait_for(lambda: other.peer != b"")
        else:
            request = peers.receiver.open(1, ranks, IDS, 0)
            assert asked(other)
        if stage == "receiving" and request is not None:
            assert wait_for(lambda: request.assembly.num_bytes > 0)
        strike(process, fault)
        check_others_go_on(peers, 2)
        assert wait_for(lambda: bool(lost) if request is None else request.state is RequestState.FAILED, PROMISE_S)
        reason, cause = lost[0] if request is None else (request.reason, request.cause)
        assert cause is Cause.LOST
        assert f"Lost the connection to prefill rank 127.0.0.1:{ranks[0][1]}" in reason
        if request is not None:
            peers.receiver.close(request, reason)
            assert wait_for(lambda: other.state is TransferState.FAILED)
            assert other.reason == reason, "the rank that lives gives up, and says why"
        check_others_go_on(peers, 3)


def test_a_prefill_rank_that_dies_while_much_waits_to_be_received() -> None:
    """ZMQ stops reading then. With its heartbeats on the same connection it ended the whole process (libzmq 4.3.5,
    stream_engine_base.cpp: "Assertion failed: !_io_error").
    """
    with child(prefill_server_in_pieces) as (prefill, its_pipe):
        assert its_pipe.poll(30)
        with child(busy_decode_server, its_pipe.recv()) as (decode, pipe):
            assert pipe.poll(30) and pipe.recv() == "busy"
            time.sleep(1)  # for what is sent to get there
            strike(prefill, signal.SIGKILL)
            assert pipe.poll(30), "hung"
            state, reason = pipe.recv()
            assert state is RequestState.FAILED and "Lost the connection to prefill rank" in reason
            assert decode.is_alive()


def test_what_a_stopped_rank_sends_late_changes_nothing() -> None:
    with cluster() as peers, child(prefill_server) as (process, pipe):
        assert pipe.poll(30)
        ranks = [("127.0.0.1", pipe.recv())]
        request = peers.receiver.open(1, ranks, IDS, 0)
        assert wait_for(lambda: request.assembly.num_bytes == 20 * (96 + 160))
        strike(process, signal.SIGSTOP)
        assert wait_for(lambda: request.state is RequestState.FAILED, PROMISE_S)
        peers.receiver.close(request, request.reason)
        others = peers.ask(4, IDS)  # its pages belong to someone else now
        for buffer in peers.pool._rows:
            buffer[:] = 7
        pipe.send("go on")
        strike(process, signal.SIGCONT)
        assert pipe.poll(30) and pipe.recv() == "sent"
        time.sleep(0.3)
        assert set(rows(peers.pool, range(500))) == {7}
        assert others.state is RequestState.RECEIVING


def test_a_prefill_server_that_gives_up_tells_who_waits_for_memory() -> None:
    lost: list[Failure] = []
    with cluster(2) as peers:
        peers.receiver.expect(1, peers.addresses, lost.append)
        transfers = [sender.open(1) for sender in peers.senders]
        assert wait_for(lambda: all(transfer.peer for transfer in transfers))
        peers.senders[1].close(transfers[1], "The prompt is too long.")
        assert wait_for(lambda: lost == [Failure("The prompt is too long.", Cause.PEER)])
