"""`sglang-apb keys`: key pairs for servers whose KV transfer crosses a network."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sglang_apb.commands import CommandError
from sglang_apb.settings import ConfigError
from sglang_apb.transfer.protocol import keys
from sglang_apb.transfer.protocol.config import OPTION

HELP = "make the keys with which prefill and decode servers know each other"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="where to put them")
    parser.add_argument("names", nargs="+", metavar="NAME", help="one for each server, such as prefill0")


def run(args: argparse.Namespace) -> int:
    try:
        secrets = keys.create(args.folder, args.names)
    except (ConfigError, OSError) as error:
        raise CommandError(str(error)) from error
    print(f"Copy {args.folder / keys.PEERS} to every server, and to each its own secret file. Start them with\n")
    for secret in secrets:
        values = {"secret_key": str(secret), "peers": str(args.folder / keys.PEERS)}
        print(f"  {secret.stem:<16} {OPTION} '{json.dumps(values)}'")
    return 0
