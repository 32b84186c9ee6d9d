"""Who gets KV when there are keys: those whose public key is in the folder, as it is now."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zmq
from sglang.srt.disaggregation.common.conn import PrefillServerInfo
from transfer_peers import (
    AUX_LENS,
    COMPAT,
    HEADS,
    Cluster,
    asked,
    cluster,
    decode_endpoint,
    make_pages,
    received,
    rows,
    send_owned,
    start_sending,
    wait_for,
)

from sglang_apb import cli
from sglang_apb.options import OptionError, PluginOptions, check_transfer
from sglang_apb.settings import ConfigError
from sglang_apb.transfer.decode.request import RequestState
from sglang_apb.transfer.memory.pages import BLOCK_BYTES
from sglang_apb.transfer.prefill.endpoint import PrefillEndpoint
from sglang_apb.transfer.prefill.transfer import TransferState
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.config import TransferConfig
from sglang_apb.transfer.protocol.keys import Keys, create, load
from sglang_apb.transfer.protocol.wire import Ask, Kind
from sglang_apb.transfer.sglang import directory
from sglang_apb.transfer.sglang.bootstrap import BACKEND, KEY_HEADER
from sglang_apb.transfer.sglang.directory import Lookup

IDS = np.arange(8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create(tmp_path, ["prefill", "decode"])
    return tmp_path


def keys_of(folder: Path, name: str, peers: Path | None = None) -> Keys:
    keys = load(TransferConfig(str(folder / f"{name}.key_secret"), str(peers or folder / "peers")))
    assert keys is not None
    return keys


def stranger(tmp_path: Path, folder: Path) -> Keys:
    """Knows the cluster's public keys, and has a pair that the cluster does not know."""
    create(tmp_path / "elsewhere", ["stranger"])
    return keys_of(tmp_path / "elsewhere", "stranger", folder / "peers")


def check_works(peers: Cluster, room_id: int) -> None:
    decode, transfer = peers.ask(room_id, IDS), peers.senders[0].open(room_id)
    assert asked(transfer), transfer.reason
    send_owned(peers.senders[0], transfer, IDS, [(0, 8)], 0)
    assert received(decode), decode.reason
    assert rows(peers.pool, IDS) == rows(peers.pools[0], IDS)
    peers.receiver.close(decode)
    peers.senders[0].close(transfer)


def test_servers_with_keys_speak_encrypted(folder: Path) -> None:
    with cluster(2, COMPAT, keys_of(folder, "prefill"), keys_of(folder, "decode")) as peers:
        decode = peers.ask(1, IDS)
        transfers = [sender.open(1) for sender in peers.senders]
        assert all(asked(transfer) for transfer in transfers)
        send_owned(peers.senders[0], transfers[0], IDS, [(0, 4)], 0)
        send_owned(peers.senders[1], transfers[1], IDS, [(4, 8)], None)
        assert received(decode), decode.reason
        assert peers.senders[0]._socket.getsockopt(zmq.MECHANISM) == zmq.CURVE
        assert all(peer.socket.getsockopt(zmq.MECHANISM) == zmq.CURVE for peer in peers.receiver._peers.values())


def test_the_largest_block_fits_encrypted(folder: Path) -> None:
    """ZMQ's limit for a part counts what encryption adds."""
    source, target = (make_pages(seed, (BLOCK_BYTES, 64), 2) for seed in (1, None))
    aux = make_pages(2, AUX_LENS, 8)
    sender = PrefillEndpoint("127.0.0.1", keys=keys_of(folder, "prefill"))
    receiver = decode_endpoint(target, aux, COMPAT, HEADS, keys_of(folder, "decode"))
    start_sending(sender, source, aux, COMPAT, HEADS)
    receiver.start()
    try:
        decode = receiver.open(1, [("127.0.0.1", sender.port, keys_of(folder, "prefill").public)], np.arange(2), 0)
        transfer = sender.open(1)
        assert asked(transfer)
        sender.announce(transfer, [(0, 2)])
        sender.send_pages(transfer, (0, 2), lambda: np.arange(2), [0])
        sender.finish(transfer, 0, {})
        assert received(decode), decode.reason
        assert rows(target, [0, 1]) == rows(source, [0, 1])
    finally:
        sender.stop()
        receiver.stop()


@pytest.mark.parametrize("who", ["no key", "unknown key"])
def test_a_stranger_gets_nothing(who: str, tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = None if who == "no key" else stranger(tmp_path, folder)
    with cluster(1, COMPAT, keys_of(folder, "prefill"), keys) as peers:
        transfer = peers.senders[0].open(1)
        for _ in range(2):
            decode = peers.ask(1, IDS)
            assert wait_for(lambda d=decode: d.state is RequestState.FAILED)
            peers.receiver.close(decode)
        if keys is not None:
            assert "does not have this server's key among its peers" in decode.reason
            refused = [record.message for record in caplog.records if "refused a peer with key" in record.message]
            assert len(refused) == 1 and keys.public in refused[0], "logged once"
        assert transfer.state is TransferState.UNASKED and not transfer.peer


def test_a_server_that_poses_as_a_prefill_server_hears_nothing(tmp_path: Path, folder: Path) -> None:
    """It listens where the real one was said to be, but does not have the key."""
    with cluster(1, COMPAT, stranger(tmp_path, folder), keys_of(folder, "decode")) as peers:
        transfer = peers.senders[0].open(1)
        real = keys_of(folder, "prefill").public
        decode = peers.receiver.open(1, [("127.0.0.1", peers.senders[0].port, real)], IDS, 0)
        assert wait_for(lambda: decode.state is RequestState.FAILED)
        with pytest.raises(ValueError, match="is not among this server's peers"):
            peers.receiver.open(2, peers.addresses, IDS, 0)
        assert transfer.state is TransferState.UNASKED


def test_keys_come_and_go_without_a_restart(folder: Path) -> None:
    known, away = folder / "peers" / "decode.key", folder / "decode.key"
    with cluster(1, COMPAT, keys_of(folder, "prefill"), keys_of(folder, "decode")) as peers:
        check_works(peers, 1)
        known.rename(away)
        decode, transfer = peers.ask(2, IDS), peers.senders[0].open(2)
        assert wait_for(lambda: decode.state is RequestState.FAILED), "over the connection that was there"
        assert "key has been revoked" in decode.reason
        peers.receiver.close(decode)
        assert transfer.state is TransferState.UNASKED
        peers.senders[0].close(transfer)
        away.rename(known)
        check_works(peers, 3)
        (folder / "peers" / "prefill.key").unlink()
        with pytest.raises(ValueError, match="is not among this server's peers"):
            peers.ask(4, IDS)


def test_a_raw_socket_without_keys_is_not_heard(folder: Path) -> None:
    with cluster(1, COMPAT, keys_of(folder, "prefill"), keys_of(folder, "decode")) as peers:
        transfer = peers.senders[0].open(1)
        context = zmq.Context()
        hostile = context.socket(zmq.DEALER)
        hostile.connect(f"tcp://127.0.0.1:{peers.senders[0].port}")
        for _ in range(100):
            hostile.send_multipart(wire.pack_message(Ask(COMPAT, 8, 0, (0, 1)), 1, 7))
            hostile.send_multipart(wire.pack(Kind.EXPECT, 1, 0))
        check_works(peers, 2)
        assert transfer.state is TransferState.UNASKED and not transfer.peer
        context.destroy(linger=0)


# what is made, and what is refused before a server starts


def test_the_command_makes_pairs_and_says_how_to_use_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    assert cli.main(["keys", str(folder), "prefill", "decode"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if "--kv-transfer-config" in line]
    assert len(shown) == 2
    values = json.loads(shown[0].split("'")[1])
    assert load(TransferConfig(**values)) is not None
    assert sorted(path.name for path in (folder / "peers").iterdir()) == ["decode.key", "prefill.key"]
    assert stat.S_IMODE(os.stat(folder / "prefill.key_secret").st_mode) == 0o600
    assert "secret-key" not in (folder / "peers" / "prefill.key").read_text()
    before = (folder / "prefill.key_secret").read_bytes()
    assert cli.main(["keys", str(folder), "prefill"]) == 1
    assert "choose another name" in capsys.readouterr().err
    assert (folder / "prefill.key_secret").read_bytes() == before
    assert cli.main(["keys", str(folder), "../x"]) == 1


def test_settings_that_cannot_work_are_refused(folder: Path) -> None:
    secret, peers = str(folder / "prefill.key_secret"), str(folder / "peers")
    for values, told in (
        ({"secret_key": secret}, "together"),
        ({"secret_key": 1, "peers": peers}, "must be a path"),
        ({"allow_unencrypted": "yes"}, "must be true or false"),
        ({"contact_seconds": 0}, "above 0, not 0"),
        ({"nccl_buffer_mb": 8}, "whole number from 16 to 16384, not 8"),
        ({"nccl_buffer_mb": 64.5}, "not 64.5"),
    ):
        with pytest.raises(ConfigError, match=told):
            TransferConfig(**values)
    public = str(folder / "peers" / "decode.key")
    for config, told in (
        (TransferConfig("/no/such/file", peers), "cannot read '/no/such/file'"),
        (TransferConfig(secret, "/no/such/folder"), "not a folder"),
        (TransferConfig(public, peers), "has no secret key"),
    ):
        with pytest.raises(ConfigError, match=told):
            load(config)
    os.chmod(secret, 0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load(TransferConfig(secret, peers))


def server(host: str, mode: str = "prefill", backend: str = BACKEND) -> Any:
    return SimpleNamespace(host=host, disaggregation_mode=mode, disaggregation_transfer_backend=backend)


def test_kv_does_not_leave_the_machine_without_keys_unless_told_so(folder: Path) -> None:
    keys = json.dumps({"secret_key": str(folder / "prefill.key_secret"), "peers": str(folder / "peers")})
    with pytest.raises(OptionError, match=r"--host 192\.0\.2\.1 would send KV unencrypted.*sglang-apb keys"):
        check_transfer(server("192.0.2.1"), PluginOptions())
    for host, text in (("127.0.0.1", None), ("192.0.2.1", keys), ("192.0.2.1", '{"allow_unencrypted": true}')):
        check_transfer(server(host), PluginOptions(transfer_text=text))
    for other in (server("127.0.0.1", backend="mooncake"), server("127.0.0.1", mode="null")):
        check_transfer(other, PluginOptions())
        with pytest.raises(OptionError, match="needs --disaggregation-transfer-backend zmq"):
            check_transfer(other, PluginOptions(transfer_text=keys))


def found(monkeypatch: pytest.MonkeyPatch, lookup: Lookup, key: str, ip: str = "127.0.0.1") -> directory.Entry:
    """What a decode server finds, of a prefill server with one rank that says it has `key`."""

    def answer(address: str, query: dict[str, str], kind: type[Any]) -> tuple[Any, dict[str, str]]:
        headers = {"X-Transfer-Backend": BACKEND, "X-Transfer-Version": str(wire.VERSION), KEY_HEADER: key}
        return (kind(ip, 4000) if kind is directory.RankAnswer else kind(1, 1, 1, 1)), headers

    monkeypatch.setattr(directory, "_get", answer)
    return lookup("prefill:8998")


def test_a_decode_server_knows_whom_it_asks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_rank(info: PrefillServerInfo) -> None:
        info.target_tp_rank, info.target_tp_ranks, info.target_cp_ranks = 0, [0], [0]

    ours, theirs = keys_of(folder, "decode"), keys_of(folder, "prefill").public
    entry = found(monkeypatch, Lookup(one_rank, ours), theirs, "192.0.2.1")
    assert entry.refusal == "" and entry.ranks["prefill:8998_0_0_0"][0]["key"] == theirs
    assert "encrypts KV: give this server" in found(monkeypatch, Lookup(one_rank), theirs).refusal
    assert "the prefill server at prefill:8998 does not" in found(monkeypatch, Lookup(one_rank, ours), "").refusal
    unknown = stranger(tmp_path, folder).public
    assert "not among this server's peers" in found(monkeypatch, Lookup(one_rank, ours), unknown).refusal
    assert found(monkeypatch, Lookup(one_rank), "").refusal == "", "on one machine"
    assert "unencrypted from 192.0.2.1" in found(monkeypatch, Lookup(one_rank), "", "192.0.2.1").refusal
    allowed = Lookup(one_rank, allow_unencrypted=True)
    assert found(monkeypatch, allowed, "", "192.0.2.1").refusal == ""
