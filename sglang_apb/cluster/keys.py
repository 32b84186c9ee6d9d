"""The keys of a cluster's servers: a folder for each, with its own pair and those of the servers that it speaks with.

KEYS/prefill0/prefill0.key_secret     to prefill0's hosts, and to no other
KEYS/prefill0/prefill0.key            its public half
KEYS/prefill0/peers/decode0.key       whom it lets in
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sglang_apb.cluster.file import PREFILL, ClusterError, ClusterFile, Server
from sglang_apb.settings import ConfigError
from sglang_apb.transfer.protocol import keys


def transfer_config(cluster: ClusterFile, server: Server) -> dict[str, Any]:
    """Of `--kv-transfer-config`."""
    config: dict[str, Any] = {"port": server.kv_port} if server.role == PREFILL else {}
    if cluster.keys:
        folder = Path(cluster.keys) / server.name
        config |= {"secret_key": str(secret_of(folder)), "peers": str(folder / keys.PEERS)}
    return config


def secret_of(folder: Path) -> Path:
    """In a server's folder."""
    return folder / f"{folder.name}.key_secret"


def write(cluster: ClusterFile) -> list[Path]:
    """Makes the pairs that are missing, and tells each server of those that the file lets it speak with. Gives the
    servers' folders. Raises ClusterError.
    """
    if not cluster.keys:
        raise ClusterError('the file names no folder for keys: give keys = "FOLDER"')
    folders = {server.name: Path(cluster.keys) / server.name for server in cluster.servers}
    try:
        for name, folder in folders.items():
            if not secret_of(folder).exists():
                keys.create(folder, [name])
                (folder / keys.PEERS / f"{name}.key").rename(folder / f"{name}.key")
        for server in cluster.servers:
            peers = folders[server.name] / keys.PEERS
            shutil.rmtree(peers, ignore_errors=True)
            peers.mkdir()
            for other in cluster.peers_of(server):
                shutil.copy(folders[other.name] / f"{other.name}.key", peers)
    except (ConfigError, OSError) as error:
        raise ClusterError(str(error)) from error
    return list(folders.values())


def lack(cluster: ClusterFile, server: Server) -> str:
    """Why the server's keys, as they lie here, cannot serve; empty when they can, or there need be none."""
    if not cluster.keys:
        return ""
    folder = Path(cluster.keys) / server.name
    if not secret_of(folder).exists():
        return (
            f"{server.name} has no keys in {folder}: run `sglang-apb cluster keys`, and copy that folder to its hosts"
        )
    there = {path.stem for path in (folder / keys.PEERS).glob("*.key")}
    wanted = {other.name for other in cluster.peers_of(server)}
    if there != wanted:
        return (
            f"{server.name}'s keys let in {', '.join(sorted(there)) or 'nobody'}, and the file says "
            f"{', '.join(sorted(wanted))}: run `sglang-apb cluster keys` anew, and copy its folder to its hosts"
        )
    return ""
