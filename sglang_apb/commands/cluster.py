"""`sglang-apb cluster`: what a cluster's file describes, before anything is started. docs/cluster.md has the file."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sglang_apb.cluster import keys
from sglang_apb.cluster.file import ClusterError, ClusterFile
from sglang_apb.commands import CommandError
from sglang_apb.commands.cluster_host import check_host, read_file

HELP = "check a cluster's file, and make its keys"
_CONNECT_TIMEOUT_S = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    check = kinds.add_parser("check", help="what in the file cannot be")
    check.add_argument("file", type=Path)
    check.add_argument("--host", help="which of the file's hosts this is: its servers' keys are looked at")
    check.add_argument("--connect", action="store_true", help="try from --host whether the others can be reached")
    check.set_defaults(run=run_check)
    make = kinds.add_parser("keys", help="make the servers' keys, in the folder that the file names")
    make.add_argument("file", type=Path)
    make.set_defaults(run=run_keys)


def run_check(args: argparse.Namespace) -> int:
    cluster = read_file(args.file)
    if args.connect and not args.host:
        raise CommandError("--connect tries from here: say with --host which of the hosts this is")
    if args.host:
        check_host(cluster, args.host)
        if found := [lack for server in cluster.servers_on(args.host) if (lack := keys.lack(cluster, server))]:
            raise CommandError("\n".join(found))
    if args.connect and (found := list(_unreachable(cluster, args.host))):
        raise CommandError("\n".join(found))
    for host, address in cluster.hosts.items():
        ports = ", ".join(f"{what} {port}" for what, port in cluster.ports_on(host).items())
        print(f"{host} ({address}): {ports or 'nothing'}")
    return 0


def run_keys(args: argparse.Namespace) -> int:
    try:
        for folder in keys.write(read_file(args.file)):
            print(f"{folder}: copy it to this server's hosts, and to no other")
    except ClusterError as error:
        raise CommandError(str(error)) from error
    return 0


def _unreachable(cluster: ClusterFile, host: str) -> Iterator[str]:
    """Ports at which nothing answers. A refusal is an answer: nobody listens there yet, and nobody is in between."""
    wanted = cluster.ports_to_reach(host)
    with ThreadPoolExecutor(16) as pool:
        reasons = pool.map(lambda place: _why_unreachable(*place), wanted.values())
        for (what, (address, port)), why in zip(wanted.items(), reasons, strict=True):
            if why:
                place = f"{what} at {address}:{port}"
                yield f"{host} cannot reach {place} ({why}): let the firewall pass it, or mend [hosts]"


def _why_unreachable(address: str, port: int) -> str:
    try:
        socket.create_connection((address, port), _CONNECT_TIMEOUT_S).close()
    except ConnectionRefusedError:
        return ""
    except OSError as error:
        return str(error.strerror or error)
    return ""
