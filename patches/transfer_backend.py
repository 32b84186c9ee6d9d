"""Seam: `--disaggregation-transfer-backend zmq`, in sglang.srt.disaggregation.

- `utils.TransferBackend` is an Enum without our name, and `utils.get_kv_class` a chain of ifs over it.
- `prefill.PrefillBootstrapQueue._init_kv_manager` and `decode.DecodePreallocQueue._init_kv_manager` build the
  manager from raw addresses; ours also needs the pool's tensors (GPU memory) and the model's configuration.

With another backend every one of these does what it did before. Official point: the choices on the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_apb.patches._patch import Patch

from sglang_apb.transfer.protocol.config import BACKEND

_MODULE = "sglang.srt.disaggregation"
_public_key = ""


def register_choice() -> None:
    """Adds our name to the choices of `--disaggregation-transfer-backend`. Adding it twice is a no-op."""
    from sglang.srt.arg_groups import choices

    if BACKEND not in choices.DISAGG_TRANSFER_BACKEND_CHOICES:
        choices.add_disagg_transfer_backend_choices([BACKEND])


def _find_backend(original: Callable[[object], Any], value: object) -> Any:
    return _zmq_member() if value == BACKEND else original(value)


def _zmq_member() -> Any:
    """Our member of SGLang's enum, made once: Enum looks it up by value from then on."""
    from sglang.srt.disaggregation.utils import TransferBackend

    member = object.__new__(TransferBackend)
    member._name_, member._value_ = BACKEND.upper(), BACKEND
    return TransferBackend._value2member_map_.setdefault(BACKEND, member)


def _find_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
    if transfer_backend.value != BACKEND:
        return original(transfer_backend, class_type)
    from sglang.srt.disaggregation.base import KVArgs
    from sglang.srt.disaggregation.utils import KVClassType

    from sglang_apb.transfer.sglang.bootstrap import ZmqKVBootstrapServer
    from sglang_apb.transfer.sglang.manager import ZmqKVManager
    from sglang_apb.transfer.sglang.receiver import ZmqKVReceiver
    from sglang_apb.transfer.sglang.sender import ZmqKVSender

    return {
        KVClassType.KVARGS: KVArgs,
        KVClassType.MANAGER: ZmqKVManager,
        KVClassType.SENDER: ZmqKVSender,
        KVClassType.RECEIVER: ZmqKVReceiver,
        KVClassType.BOOTSTRAP_SERVER: ZmqKVBootstrapServer.with_key(_public_key),
    }[class_type]


def use_key(public_key: str) -> None:
    """What this process's bootstrap server, which SGLang gives a host and a port only, tells decode servers."""
    global _public_key
    _public_key = public_key


def _start_manager(manager: Any, queue: Any) -> None:
    if queue.transfer_backend.value == BACKEND:
        manager.start(queue.token_to_kv_pool, queue.scheduler.model_config)


PATCHES: tuple[Patch, ...] = (
    Patch(f"{_MODULE}.utils.TransferBackend._missing_", "around", ("cls", "value"), _find_backend),
    Patch(f"{_MODULE}.utils.get_kv_class", "around", ("transfer_backend", "class_type"), _find_class),
    Patch(f"{_MODULE}.prefill.PrefillBootstrapQueue._init_kv_manager", "after", ("self",), _start_manager),
    Patch(f"{_MODULE}.decode.DecodePreallocQueue._init_kv_manager", "after", ("self",), _start_manager),
)
