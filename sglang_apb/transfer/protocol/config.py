"""Every setting of the KV transfer, once: its default, its meaning, its check."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sglang_apb.settings import ConfigError, setting
from sglang_apb.transfer.planes.table import AUTO, PLANES, ZMQ

# The value of `--disaggregation-transfer-backend` that is ours.
BACKEND = "zmq"
OPTION = "--kv-transfer-config"


@dataclass(frozen=True)
class TransferConfig:
    secret_key: str | None = setting(None, "file with this server's key pair, made by `sglang-apb keys`")
    peers: str | None = setting(None, "folder with the public keys of the servers that it may talk to")
    allow_unencrypted: bool = setting(False, "let KV leave this machine without keys")

    port: int = setting(
        0,
        "where a prefill server's first rank on a host listens for decode servers, its next ones at the ports that "
        "follow; 0 lets the system choose, which no firewall knows",
    )
    data_plane: str = setting(
        AUTO,
        "how pages move: zmq (through host memory, any machine), cuda_ipc (the decode server's GPU reads the prefill "
        "server's memory: one machine, one user), nccl (from GPU to GPU, never encrypted), file:FOLDER (through files, "
        "slow), or auto: the first of cuda_ipc, nccl (with allow_unencrypted, without keys) and zmq that works",
    )
    nccl_buffer_mb: int = setting(
        256,
        "GPU memory on either side for each pair of ranks with nccl, the smaller counts; over NVLink more is faster",
    )
    contact_seconds: float = setting(
        30.0,
        "a request fails when one of the servers has not heard of it for as long: it is down or hung, or refused it",
    )

    def __post_init__(self) -> None:
        for name in ("secret_key", "peers"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name} of {OPTION} must be a path, not {value!r}")
        if not isinstance(self.allow_unencrypted, bool):
            raise ConfigError(f"allow_unencrypted of {OPTION} must be true or false, not {self.allow_unencrypted!r}")
        self._check_plane()
        if isinstance(self.port, bool) or not isinstance(self.port, int) or not 0 <= self.port < 65536:
            raise ConfigError(f"port of {OPTION} must be a whole number from 1 to 65535, or 0, not {self.port!r}")
        seconds = self.contact_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
            raise ConfigError(f"contact_seconds of {OPTION} must be a number of seconds above 0, not {seconds!r}")
        if not isinstance(self.nccl_buffer_mb, int) or not 16 <= self.nccl_buffer_mb <= 1 << 14:
            raise ConfigError(
                f"nccl_buffer_mb of {OPTION} must be a whole number from 16 to {1 << 14}, not {self.nccl_buffer_mb!r}"
            )
        if (self.secret_key is None) != (self.peers is None):
            raise ConfigError(f"{OPTION} needs secret_key and peers together: one says who this server is, one whom it")

    @property
    def plane(self) -> str:
        """The name in `data_plane`."""
        return self.data_plane.partition(":")[0]

    @property
    def plane_argument(self) -> str:
        """What `data_plane` says after the name."""
        return self.data_plane.partition(":")[2]

    def may_use(self, plane: str) -> bool:
        return self.plane == plane or (self.plane == AUTO and PLANES[plane].by_itself)

    def _check_plane(self) -> None:
        arguments = {AUTO: "", ZMQ: "", **{name: plane.argument for name, plane in PLANES.items()}}
        known = [f"{name}:{argument}" if argument else name for name, argument in arguments.items()]
        is_text = isinstance(self.data_plane, str)
        wants_argument = bool(arguments.get(self.plane)) if is_text else False
        if not is_text or self.plane not in arguments or bool(self.plane_argument) != wants_argument:
            raise ConfigError(f"data_plane of {OPTION} must be one of {', '.join(known)}, not {self.data_plane!r}")
