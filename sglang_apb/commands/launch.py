"""`sglang-apb launch`: prefill, decode and router on this machine, or what a cluster's file puts here; until Ctrl-C."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sglang_apb.commands import CommandError
from sglang_apb.commands.cluster_host import ClusterHost, read_file
from sglang_apb.commands.servers import STARTUP_TIMEOUT_S, LocalCluster, LocalService, default_sp_size

HELP = "start a prefill/decode cluster on this machine"
STOCK = "none"
VERBATIM_OPTIONS = ("--prefill-args", "--decode-args")
# What the servers are given already, or what this command could not ask them with -> what to do instead.
_NOT_FOR_SERVERS = {
    "--host": "they listen on this machine only, and the router asks them there",
    "--port": "give --port before --; the servers have the next ones",
    "--nccl-port": "give --port before --; the servers have the next ones",
    "--disaggregation-bootstrap-port": "give --port before --; the servers have the next ones",
    "--disaggregation-mode": "each has its own",
    "--disaggregation-transfer-backend": "give --transfer-backend before --",
    "--prefill-backend": "give it before --",
    "--sp-size": "give it before --",
    "--ssl-certfile": "they are asked over HTTP",
    "--ssl-keyfile": "they are asked over HTTP",
    "--grpc-mode": "they are asked over HTTP",
    "--smg-grpc-mode": "they are asked over HTTP",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="model folder, or name on the Hugging Face hub: a cluster on this machine")
    what.add_argument("--cluster", type=Path, metavar="FILE", help="what a cluster's file puts on --host; nothing else")
    parser.add_argument("--host", metavar="NAME", help="which of the hosts of --cluster this is")
    parser.add_argument("--sp-size", type=int, default=None, help="prefill ranks; 2 if left out, 1 with one GPU")
    parser.add_argument("--prefill-backend", default="apb", help=f"apb; {STOCK!r} is SGLang's own prefill")
    parser.add_argument("--transfer-backend", default="zmq", help="how KV travels: zmq, mooncake, nixl")
    parser.add_argument("--port", type=int, default=30000, help="the router's; the next 6 are used too")
    parser.add_argument("--log-dir", type=Path, default=None, help="logs/pd-DATE-TIME if left out")
    parser.add_argument("--startup-timeout", type=float, default=STARTUP_TIMEOUT_S, metavar="SECONDS")
    for option, server in zip(VERBATIM_OPTIONS, ("prefill", "decode"), strict=True):
        parser.add_argument(option, default="", metavar="'ARGS'", help=f"for the {server} server only, in quotes")
    parser.add_argument("server_args", nargs="*", metavar="-- ARGS", help="for both servers, after --")


def run(args: argparse.Namespace) -> int:
    if (args.cluster is None) != (args.host is None):
        raise CommandError("--cluster FILE and --host NAME go together: which of the file's hosts this is")
    if args.cluster and (args.server_args or args.prefill_args or args.decode_args or args.sp_size is not None):
        raise CommandError("--cluster takes the servers' ranks and arguments from its file: leave them out here")
    return serve(_cluster(args) if args.cluster is None else _host(args), args.startup_timeout)


def _host(args: argparse.Namespace) -> ClusterHost:
    cluster = read_file(args.cluster)
    log_dir: Path = args.log_dir or Path(cluster.log_dir) / args.host
    _say(f"logs in {log_dir.absolute()}")
    return ClusterHost(cluster, args.host, log_dir, _say)


def serve(service: LocalService, timeout: float) -> int:
    """Starts `service`, prints READY and its URL when it answers, and ends it when a signal comes.

    `timeout` in seconds, for the start. Returns the exit status. Raises ServiceError when a server ends.
    """
    with service:
        service.wait_ready(timeout)
        print(f"READY {service.url}", flush=True)
        service.wait()
    return 0


def _cluster(args: argparse.Namespace) -> LocalCluster:
    stock = args.prefill_backend == STOCK
    sp_size = args.sp_size if args.sp_size is not None else 1 if stock else default_sp_size()
    if stock and sp_size != 1:
        raise CommandError(f"--sp-size {sp_size} needs --prefill-backend apb: SGLang's own prefill has one rank here")
    if sp_size < 1:
        raise CommandError(f"--sp-size must be at least 1, not {sp_size}")
    prefill_arguments, decode_arguments = shlex.split(args.prefill_args), shlex.split(args.decode_args)
    _check_for_servers([*args.server_args, *prefill_arguments, *decode_arguments])
    log_dir: Path = args.log_dir or Path("logs") / time.strftime("pd-%Y%m%d-%H%M%S")
    _say(f"logs in {log_dir.absolute()}")
    return LocalCluster(
        args.model,
        port=args.port,
        log_dir=log_dir,
        sp_size=sp_size,
        prefill_backend=None if stock else args.prefill_backend,
        transfer_backend=args.transfer_backend,
        arguments=args.server_args,
        prefill_arguments=prefill_arguments,
        decode_arguments=decode_arguments,
        report=_say,
    )


def _check_for_servers(arguments: Sequence[str]) -> None:
    names = [argument.partition("=")[0] for argument in arguments]
    for option, instead in _NOT_FOR_SERVERS.items():
        if option in names:
            raise CommandError(f"{option} is not for the servers that launch starts: {instead}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
