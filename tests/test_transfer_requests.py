"""Endpoints over real sockets: complete or not, right bytes in the right pages, hostile peers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hostile import FakeDecode, FakePrefill, honest_frames
from transfer_peers import (
    AUX_LENS,
    COMPAT,
    HEADS,
    ITEM_LENS,
    Cluster,
    asked,
    cluster,
    decode_endpoint,
    received,
    rows,
    send_owned,
    start_sending,
    wait_for,
)

from sglang_apb.transfer.decode.request import RequestState
from sglang_apb.transfer.prefill.transfer import TransferState
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.ownership import PageRange
from sglang_apb.transfer.protocol.wire import Ask, Stop

ZIGZAG: dict[int, list[list[PageRange]]] = {
    1: [[(0, 120)]],
    2: [[(0, 30), (90, 120)], [(30, 90)]],
    3: [[(0, 20), (100, 120)], [(20, 40), (80, 100)], [(40, 80)]],
}


@pytest.mark.parametrize("num_ranks", ZIGZAG)
@pytest.mark.parametrize("chunk", [120, 7])
def test_zigzag_ranks_fill_the_right_pages(num_ranks: int, chunk: int) -> None:
    rng = np.random.default_rng(num_ranks)
    with cluster(num_ranks) as peers:
        target = rng.permutation(500)[:120].astype(np.int64)
        sources = [rng.permutation(500)[:120].astype(np.int64) for _ in range(num_ranks)]
        decode = peers.ask(11, target)
        transfers = [sender.open(11) for sender in peers.senders]
        for rank, (sender, transfer) in enumerate(zip(peers.senders, transfers, strict=True)):
            assert asked(transfer)
            aux_index = 5 if rank == 0 else None
            send_owned(sender, transfer, sources[rank], ZIGZAG[num_ranks][rank], aux_index, chunk, {"rank": rank})
        assert received(decode), decode.reason
        assert wait_for(lambda: all(transfer.state is TransferState.DONE for transfer in transfers))
        for rank, owned in enumerate(ZIGZAG[num_ranks]):
            for start, end in owned:
                assert rows(peers.pool, target[start:end]) == rows(peers.pools[rank], sources[rank][start:end])
        untouched = np.setdiff1d(np.arange(500), target)
        assert not any(rows(peers.pool, untouched))
        assert rows(peers.aux, [3]) == rows(peers.auxes[0], [5])
        assert not any(rows(peers.aux, [0, 1, 2, 4, 5, 6, 7]))
        assert decode.assembly.num_bytes == sum(transfer.num_bytes for transfer in transfers) == 120 * sum(ITEM_LENS)
        assert decode.assembly.info == {"rank": 0}


def test_a_rank_without_pages_takes_part() -> None:
    with cluster(3) as peers:
        ids = np.arange(4)
        decode = peers.ask(1, ids)
        transfers = [sender.open(1) for sender in peers.senders]
        assert all(asked(transfer) for transfer in transfers)
        send_owned(peers.senders[0], transfers[0], ids, [(0, 4)], 0)
        send_owned(peers.senders[1], transfers[1], ids, [], None)
        time.sleep(0.05)
        assert decode.state is RequestState.RECEIVING
        send_owned(peers.senders[2], transfers[2], ids, [], None)
        assert received(decode)


def test_overlapping_ownership_fails_on_both_sides() -> None:
    with cluster(2) as peers:
        ids = np.arange(10)
        decode = peers.ask(1, ids)
        transfers = [sender.open(1) for sender in peers.senders]
        assert all(asked(transfer) for transfer in transfers)
        send_owned(peers.senders[0], transfers[0], ids, [(0, 6)], 0)
        send_owned(peers.senders[1], transfers[1], ids, [(5, 10)], None)
        assert not received(decode)
        assert "both hold pages [5, 6)" in decode.reason
        peers.receiver.close(decode, decode.reason)
        assert wait_for(lambda: all(transfer.state is TransferState.FAILED for transfer in transfers))
        assert all("both hold pages [5, 6)" in transfer.reason for transfer in transfers)


def test_ask_may_come_before_or_after_the_request() -> None:
    with cluster() as peers:
        for room_id, decode_first in ((1, True), (2, False)):
            transfer = None if decode_first else peers.senders[0].open(room_id)
            decode = peers.ask(room_id, np.arange(8))
            time.sleep(0.05)
            transfer = transfer or peers.senders[0].open(room_id)
            assert asked(transfer)
            send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 0)
            assert received(decode)


def test_layers_go_as_they_become_final_and_others_do_not_wait() -> None:
    rng = np.random.default_rng(5)
    final = [False, False, False]
    with cluster() as peers:
        source, target = rng.permutation(500)[:40].astype(np.int64), rng.permutation(500)[:40].astype(np.int64)
        decode, transfer = peers.ask(1, target[:20]), peers.senders[0].open(1)
        assert asked(transfer)
        peers.senders[0].announce(transfer, [(0, 20)])
        for layer in range(3):
            is_final = partial(final.__getitem__, layer)
            ids = partial(_only_if, is_final, source[:20])
            peers.senders[0].send_pages(transfer, (0, 20), ids, [layer], is_final)
        for layer in range(3):
            assert wait_for(lambda n=layer: decode.assembly.num_bytes == n * 20 * (96 + 160))
            if layer == 1:
                check_another_request(peers, source[20:], target[20:])
            assert decode.assembly.num_bytes == layer * 20 * (96 + 160)
            final[layer] = True
        assert wait_for(lambda: transfer.num_bytes == 20 * sum(ITEM_LENS))
        transfer.end_prefill()
        peers.senders[0].finish(transfer, 0, {})
        assert received(decode), decode.reason
        assert rows(peers.pool, target[:20]) == rows(peers.pools[0], source[:20])
        assert decode.assembly.num_hidden_bytes == transfer.num_hidden_bytes == 20 * sum(ITEM_LENS)


def _only_if(is_final: Callable[[], bool], ids: np.ndarray) -> np.ndarray:
    assert is_final()
    return ids


def check_another_request(peers: Cluster, source: np.ndarray, target: np.ndarray) -> None:
    """It passes while the first one's next layer is still computed."""
    decode, transfer = peers.ask(2, target), peers.senders[0].open(2)
    assert asked(transfer)
    send_owned(peers.senders[0], transfer, source, [(0, 20)], 1)
    assert received(decode), decode.reason
    assert rows(peers.pool, target) == rows(peers.pools[0], source)


def test_a_request_closed_while_its_layers_are_computed_is_not_read_any_more() -> None:
    with cluster() as peers:
        decode, transfer = peers.ask(1, np.arange(8)), peers.senders[0].open(1)
        assert asked(transfer)
        final = threading.Event()
        peers.senders[0].announce(transfer, [(0, 8)])
        peers.senders[0].send_pages(transfer, (0, 8), lambda: pytest.fail("read"), [0], final.is_set)
        peers.senders[0].close(transfer, "Aborted.")
        final.set()
        assert not received(decode)
        assert decode.reason == "Aborted." and decode.assembly.num_bytes == 0
        assert wait_for(lambda: not peers.senders[0]._outgoing._busy), "a closed request does not keep the thread awake"


def test_many_requests_at_once() -> None:
    rng = np.random.default_rng(3)
    with cluster() as peers:
        slots = rng.permutation(500).astype(np.int64).reshape(20, 25)
        decodes = [peers.ask(transfer, slots[transfer], transfer % 8) for transfer in range(20)]
        transfers = [peers.senders[0].open(transfer) for transfer in range(20)]
        assert all(asked(transfer) for transfer in transfers)
        for index in rng.permutation(20):
            send_owned(peers.senders[0], transfers[index], slots[19 - index], [(0, 25)], 1, chunk=4)
        assert all(received(decode) for decode in decodes)
        for index in range(20):
            assert rows(peers.pool, slots[index]) == rows(peers.pools[0], slots[19 - index])


def test_a_block_larger_than_one_message() -> None:
    from transfer_peers import make_pages

    from sglang_apb.transfer.prefill.endpoint import PrefillEndpoint

    item_lens = (4096, 2048)
    source, target = make_pages(1, item_lens, 2000), make_pages(None, item_lens, 2000)
    aux = make_pages(2, AUX_LENS, 8)
    sender, receiver = PrefillEndpoint("127.0.0.1"), decode_endpoint(target, aux, COMPAT, HEADS)
    start_sending(sender, source, aux, COMPAT, HEADS)
    receiver.start()
    try:
        decode = receiver.open(1, [("127.0.0.1", sender.port)], np.arange(2000), 0)
        transfer = sender.open(1)
        assert asked(transfer)
        send_owned(sender, transfer, np.arange(2000)[::-1].copy(), [(0, 2000)], 0, num_layers=1)
        assert received(decode, 10)
        assert rows(target, np.arange(2000)) == rows(source, np.arange(2000)[::-1])
    finally:
        sender.stop()
        receiver.stop()


def test_different_settings_are_refused_on_both_sides() -> None:
    import msgspec

    with cluster(2, msgspec.structs.replace(COMPAT, page_size=16)) as peers:
        early = peers.senders[0].open(1)
        decode = peers.ask(1, np.arange(8))
        assert not received(decode)
        assert "page size 1, the decode server 16" in decode.reason
        late = peers.senders[1].open(1)
        for transfer in (early, late):
            assert wait_for(lambda transfer=transfer: transfer.state is TransferState.FAILED)
            assert transfer.reason == decode.reason


def test_closing_on_decode_stops_the_prefill_rank_and_late_frames() -> None:
    with cluster() as peers:
        decode = peers.ask(1, np.arange(8))
        transfer = peers.senders[0].open(1)
        assert asked(transfer)
        peers.receiver.close(decode, "Aborted by the client.")
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 0)
        assert wait_for(lambda: transfer.state is TransferState.FAILED)
        assert transfer.reason == "Aborted by the client."
        time.sleep(0.05)
        assert not any(rows(peers.pool, np.arange(500)))
        assert not peers.receiver._requests


def test_a_frame_that_was_looked_up_before_the_room_closed_is_not_written() -> None:
    """The pages may belong to another request by then."""
    with cluster() as peers, FakePrefill() as prefill:
        decode = peers.receiver.open(1, [prefill.address], np.arange(8), 0)
        transfer, attempt = prefill.wait_for_ask()
        peers.receiver.close(decode)
        peers.receiver._requests[1] = decode
        for frame in honest_frames(transfer, attempt):
            prefill.send(frame)
        assert not received(decode, 0.2)
        assert not any(rows(peers.pool, range(500)))


def test_a_failing_command_does_not_end_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    with cluster() as peers:
        for endpoint in (peers.receiver, peers.senders[0]):
            endpoint.call(lambda: [][0])
        decode, transfer = peers.ask(1, np.arange(8)), peers.senders[0].open(1)
        assert asked(transfer)
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 0)
        assert received(decode)
    assert sum("the transfer thread goes on" in record.message for record in caplog.records) == 2


def test_pages_that_cannot_be_read_fail_the_request_only() -> None:
    with cluster() as peers:
        for room_id, ids in ((1, lambda: [][0]), (2, lambda: np.arange(8))):
            decode, transfer = peers.ask(room_id, np.arange(8)), peers.senders[0].open(room_id)
            assert asked(transfer)
            peers.senders[0].announce(transfer, [(0, 8)])
            peers.senders[0].send_pages(transfer, (0, 8), ids, range(3))
            peers.senders[0].finish(transfer, 0, {})
            assert received(decode) is (room_id == 2)
            if room_id == 1:
                assert "could not read the request's pages" in decode.reason == transfer.reason


def test_closing_on_decode_before_prefill_knows_the_request() -> None:
    with cluster() as peers:
        peers.receiver.close(peers.ask(1, np.arange(8)), "Aborted by the client.")
        peers.receiver.refuse(2, peers.addresses, "Another page size.")
        time.sleep(0.05)
        for room_id, reason in ((1, "Aborted by the client."), (2, "Another page size.")):
            transfer = peers.senders[0].open(room_id)
            assert wait_for(lambda transfer=transfer: transfer.state is TransferState.FAILED)
            assert transfer.reason == reason


def test_a_late_stop_does_not_hit_the_next_request_of_its_room() -> None:
    with cluster() as peers, FakeDecode(peers) as stranger:
        late_stop = wire.pack_message(Stop("Too late."), 1, 7)
        stranger.send(wire.pack_message(Ask(COMPAT, 8, 0, (0, 1)), 1, 7))
        first = peers.senders[0].open(1)
        assert asked(first)
        peers.senders[0].close(first)
        stranger.send(late_stop)
        time.sleep(0.05)
        second = peers.senders[0].open(1)
        stranger.send(late_stop)
        decode = peers.ask(1, np.arange(8))
        assert asked(second)
        stranger.send(late_stop)
        send_owned(peers.senders[0], second, np.arange(8), [(0, 8)], 0)
        assert received(decode)


def test_closing_on_prefill_stops_the_decode_server() -> None:
    with cluster() as peers:
        decode = peers.ask(1, np.arange(8))
        transfer = peers.senders[0].open(1)
        assert asked(transfer)
        peers.senders[0].close(transfer, "Aborted on prefill.")
        assert not received(decode) and decode.reason == "Aborted on prefill."
        assert not len(peers.senders[0].transfers)


def test_a_request_given_up_before_it_was_asked_for() -> None:
    with cluster() as peers:
        peers.senders[0].close(peers.senders[0].open(1), "Too long for this server.")
        time.sleep(0.05)
        decode = peers.ask(1, np.arange(8))
        assert not received(decode) and decode.reason == "Too long for this server."


def test_a_room_can_be_used_again() -> None:
    """Retraction on the decode server asks again for the same room; frames of the first time are ignored."""
    with cluster() as peers:
        for attempt in range(3):
            decode = peers.ask(9, np.arange(8) + 8 * attempt)
            transfer = peers.senders[0].open(9)
            assert asked(transfer)
            send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 0)
            assert received(decode) and wait_for(lambda transfer=transfer: transfer.state is TransferState.DONE)
            peers.receiver.close(decode)
            peers.senders[0].close(transfer)
        assert rows(peers.pool, np.arange(24)) == b"".join(
            peers.pools[0].gather(b, 1, np.tile(np.arange(8), 3)).tobytes() for b in range(len(ITEM_LENS))
        )


def test_a_room_in_use_is_refused() -> None:
    with cluster() as peers:
        peers.ask(1, np.arange(8))
        peers.senders[0].open(1)
        with pytest.raises(ValueError, match="room 1 is in use"):
            peers.ask(1, np.arange(8))
        with pytest.raises(ValueError, match="room 1 is in use"):
            peers.senders[0].open(1)
        with pytest.raises(ValueError, match=r"leave \[0, 500\)"):
            peers.ask(2, np.array([3, 500]))


def test_a_dead_prefill_rank_fails_its_requests_only() -> None:
    with cluster(2) as peers:
        lost = peers.ask(1, np.arange(8))
        kept = peers.receiver.open(2, peers.addresses[1:], np.arange(8) + 8, 0)
        transfer = peers.senders[1].open(2)
        assert asked(transfer)
        peers.senders[0].call(lambda: peers.senders[0].forget(peers.senders[0]._socket))
        assert not received(lost) and "Lost the connection to prefill rank" in lost.reason and lost.lost_rank
        send_owned(peers.senders[1], transfer, np.arange(8), [(0, 8)], 0)
        assert received(kept)


def test_a_dead_decode_server_fails_its_requests_only() -> None:
    with cluster() as peers, FakeDecode(peers) as stranger:
        lost, kept = peers.senders[0].open(1), peers.senders[0].open(2)
        stranger.send(wire.pack_message(Ask(COMPAT, 8, 0, (0, 1)), 1, 7))
        decode = peers.ask(2, np.arange(8))
        assert asked(lost) and asked(kept)
        stranger.socket.close(linger=0)
        time.sleep(0.1)
        for transfer in (lost, kept):
            send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 0)
        assert wait_for(lambda: lost.state is TransferState.FAILED)
        assert "Lost the connection to the decode server" in lost.reason
        assert received(decode)
