"""A cluster of which the decode server is on another machine, as far as the network can tell: behind a `lossy_link`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lossy_link import ALSO_THERE, HERE, NAMESPACE, THERE
from test_server_faults import key_config

from sglang_apb.commands.processes import ProcessGroup
from sglang_apb.commands.servers import HOST, LocalCluster

IN_NAMESPACE = ("ip", "netns", "exec", NAMESPACE)
# Where only its router asks a decode server, so that a cut between those two is no other's.
ROUTERS = ALSO_THERE


def spread(cluster: LocalCluster, keys: Path, *, decode_is_far: bool) -> LocalCluster:
    """Before its start: prefill listens at HERE, decode at THERE if it is far, and KV goes with the keys "prefill" and
    "decode" of the folder.
    """
    prefill, decode, router = cluster.groups
    urls = {_url(prefill, HOST): _url(prefill, HERE)}
    prefill = _changed(prefill, {HOST: HERE}, more=key_config(keys, "prefill"))
    decode = _changed(decode, {}, more=key_config(keys, "decode"))
    if decode_is_far:
        urls[_url(decode, HOST)] = _url(decode, ROUTERS)
        decode = _changed(decode, {HOST: "0.0.0.0"}, before=IN_NAMESPACE, env={"SGLANG_HOST_IP": THERE})
    cluster.groups = [prefill, decode, _changed(router, urls)]
    return cluster


def _changed(
    group: ProcessGroup,
    parts: Mapping[str, str],
    before: Sequence[str] = (),
    more: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> ProcessGroup:
    """The same with other `parts` of its command, words `before` it and `more` after it."""
    command = [*before, *(parts.get(part, part) for part in group.command), *more]
    return ProcessGroup(group.name, command, group.log_path, group._env | dict(env or {}))


def _url(group: ProcessGroup, host: str) -> str:
    return f"http://{host}:{group.command[group.command.index('--port') + 1]}"
