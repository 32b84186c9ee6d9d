"""Who may take part in a transfer: one CURVE key pair a server, and a folder with the public keys of its peers.

    keys/prefill.key_secret     this server's pair (`secret_key`), readable by its owner only
    keys/peers/decode.key       a peer's public key; to let a server in, add its file; to shut it out, delete it

`sglang-apb keys keys prefill decode` makes them, in the format of `zmq.auth`. Keys are Z85 text, 40 characters.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.auth

from sglang_apb.settings import ConfigError
from sglang_apb.transfer.protocol.config import OPTION, TransferConfig

logger = logging.getLogger(__name__)

PEERS = "peers"


class PeerKeys:
    """The public keys in a folder, as it is now: what is added or deleted counts at once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._names: dict[str, str] = {}
        self._seen: tuple[tuple[str, int], ...] = ()
        self._refused: set[str] = set()

    def allows(self, key: str) -> bool:
        """Whether a peer with this public key may take part. The first refusal of a key is logged."""
        self._read()
        if key in self._names:
            return True
        if key not in self._refused and len(self._refused) < 1000:
            self._refused.add(key)
            logger.warning("KV transfer: refused a peer with key %s: no file in %s has it.", key, self._folder)
        return False

    def _read(self) -> None:
        try:
            with os.scandir(self._folder) as entries:
                files = [entry for entry in entries if entry.name.endswith(".key")]
                seen = tuple(sorted((entry.path, entry.stat().st_mtime_ns) for entry in files))
        except OSError as error:
            logger.error(
                "KV transfer: cannot read the keys in %s (%s): nobody is let in.", self._folder, error.strerror
            )
            self._names, self._seen = {}, ()
            return
        if seen != self._seen:
            self._names = {key: path for path, _ in seen if (key := _public_key(path))}
            self._seen = seen
            self._refused.clear()


@dataclass(frozen=True)
class Keys:
    """This server's pair, and whom it lets in."""

    public: str
    secret: str
    peers: PeerKeys

    def listen(self, socket: zmq.Socket) -> None:
        """Before `bind`: only peers that ZMQ's authenticator allows can speak to `socket`."""
        socket.curve_server = True
        self._introduce(socket)

    def speak_to(self, socket: zmq.Socket, public_key: str) -> None:
        """Before `connect`: `socket` speaks only to the owner of `public_key`."""
        socket.curve_serverkey = public_key.encode()
        self._introduce(socket)

    def _introduce(self, socket: zmq.Socket) -> None:
        socket.curve_publickey, socket.curve_secretkey = self.public.encode(), self.secret.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        """What `zmq.auth`'s authenticator asks."""
        return self.peers.allows(key.decode())


def load(config: TransferConfig) -> Keys | None:
    """None without keys. Raises ConfigError when a file or folder is missing, or others can read the secret."""
    if config.secret_key is None or config.peers is None:
        return None
    path, folder = Path(config.secret_key).expanduser(), Path(config.peers).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"peers of {OPTION} is {str(folder)!r}, which is not a folder: `sglang-apb keys` makes one")
    try:
        public, secret = zmq.auth.load_certificate(path)
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise ConfigError(f"secret_key of {OPTION}: cannot read {str(path)!r} ({error})") from error
    if secret is None:
        raise ConfigError(f"secret_key of {OPTION}: {str(path)!r} has no secret key; it ends in .key_secret")
    if mode & 0o077:
        raise ConfigError(f"secret_key of {OPTION}: others can read {str(path)!r}; run chmod 600 on it")
    return Keys(public.decode(), secret.decode(), PeerKeys(folder))


def create(folder: Path, names: Sequence[str]) -> list[Path]:
    """Makes a pair for each name. Gives the secret files. Raises ConfigError rather than overwrite one."""
    peers = folder / PEERS
    secrets = [folder / f"{name}.key_secret" for name in names]
    for name, path in zip(names, secrets, strict=True):
        if not name or not all(letter.isalnum() or letter in "-_." for letter in name):
            raise ConfigError(f"a server's name is made of letters, digits, '-', '_' and '.', not {name!r}")
        if path.exists():
            raise ConfigError(f"{path} exists: choose another name, or delete it and {peers / name}.key")
    peers.mkdir(parents=True, exist_ok=True)
    before = os.umask(0o077)
    try:
        for name in names:
            public, _ = zmq.auth.create_certificates(folder, name)
            Path(public).rename(peers / f"{name}.key")
    finally:
        os.umask(before)
    return secrets


def _public_key(path: str) -> str | None:
    try:
        public, _ = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        logger.warning("KV transfer: %s is not a public key (%s).", path, error)
        return None
    return public.decode()
