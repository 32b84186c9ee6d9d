"""The transfer of one scheduler process: SGLang's KV manager, with our endpoint instead of its socket."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from sglang.srt.disaggregation.base.conn import KVArgs, KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVManager
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.server_args import ServerArgs

from sglang_apb.patches import insides
from sglang_apb.transfer.decode.endpoint import DecodeEndpoint
from sglang_apb.transfer.memory.gpu_pages import open_pool
from sglang_apb.transfer.memory.heads import Shares, heads_of
from sglang_apb.transfer.memory.pages import in_layers, open_host_memory
from sglang_apb.transfer.planes import choice
from sglang_apb.transfer.planes.base import Pool
from sglang_apb.transfer.prefill.endpoint import PrefillEndpoint
from sglang_apb.transfer.protocol import hosts, keys
from sglang_apb.transfer.protocol.compat import Compat, describe_model
from sglang_apb.transfer.protocol.config import TransferConfig
from sglang_apb.transfer.protocol.hosts import Address
from sglang_apb.transfer.protocol.room_number import ROOMS
from sglang_apb.transfer.sglang.bootstrap import BACKEND
from sglang_apb.transfer.sglang.directory import PrefillDirectory
from sglang_apb.transfer.sglang.reasons import Reasons
from sglang_apb.transfer.sglang.wall import fails_alone

logger = logging.getLogger(__name__)


class ZmqKVManager(CommonKVManager):
    """`start` must follow: SGLang builds the manager before anyone can hand it the pool's tensors.

    Raises ValueError when the server runs with something that this backend does not move.
    """

    prefill_endpoint: PrefillEndpoint
    decode_endpoint: DecodeEndpoint
    num_layers: int

    def __init__(
        self,
        args: KVArgs,
        disaggregation_mode: DisaggregationMode,
        server_args: ServerArgs,
        is_mla_backend: bool | None = False,
    ):
        options = insides.resolved(server_args)
        _check_supported(args, disaggregation_mode, options, bool(is_mla_backend))
        self._with_metrics = options.enable_metrics
        transfer: TransferConfig = insides.options_of(server_args).transfer()
        self.contact_seconds, self._transfer = transfer.contact_seconds, transfer
        self._keys = keys.load(transfer)
        with _local_ip(hosts.listening_host(options.host)):
            super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        # Every context-parallel rank sends what it holds, and decode waits for all of them.
        self.enable_all_cp_ranks_for_transfer = True
        self.is_dummy_cp_rank = False
        self.refusals: dict[str, str] = {}
        self.reasons = Reasons.of_this_server()
        self._directory = PrefillDirectory(
            self._resolve_rank_mapping, self._keys, allow_unencrypted=transfer.allow_unencrypted
        )
        self.server_socket.close(linger=0)

    def register_to_bootstrap(self) -> None:
        """Called by SGLang's constructor on prefill ranks: publishes our port, not SGLang's socket's."""
        first = self._transfer.port
        self.prefill_endpoint = PrefillEndpoint(
            self.local_ip,
            keys=self._keys,
            port=first and first + insides.rank_on_host(),
            contact_seconds=self.contact_seconds,
            with_metrics=self._with_metrics,
        )
        self.rank_port = self.prefill_endpoint.port
        super().register_to_bootstrap()

    def start(self, pool: Any, model_config: Any) -> None:
        """Starts moving pages of `pool` (SGLang's KV pool) for the model of `model_config` (its ModelConfig).

        Raises ValueError when the pool is not one buffer of keys and one of values a layer, or cannot be moved as
        `data_plane` says.
        """
        args = self.kv_args
        k_buffers, v_buffers = (list(getattr(pool, name, None) or ()) for name in ("k_buffer", "v_buffer"))
        if [buffer.data_ptr() for buffer in (*k_buffers, *v_buffers)] != list(args.kv_data_ptrs):
            raise ValueError(
                f"--disaggregation-transfer-backend {BACKEND} moves plain key and value pools only, not "
                f"{type(pool).__name__} (with speculative decoding, a second pool): use mooncake or nixl."
            )
        self.num_layers = len(k_buffers)
        self._set_heads(model_config, num_in_pool=k_buffers[0].shape[1])
        pages = open_pool(in_layers(k_buffers, v_buffers), self._in_layers(args.kv_data_lens), self._item_lens())
        aux = open_host_memory(args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens)
        compat = self._describe(model_config)
        pool_here = Pool(pages, self._heads, args.page_size)
        if self.disaggregation_mode == DisaggregationMode.PREFILL:
            planes = choice.send_planes(pool_here, self._transfer)
            self.prefill_endpoint.start_sending(pool_here, aux, compat, planes)
        else:
            self.decode_endpoint = DecodeEndpoint(
                *(pool_here, aux, compat, self._keys),
                with_metrics=self._with_metrics,
                planes=choice.receive_planes(pool_here, self._transfer),
            )
            self.decode_endpoint.start()
            self._start_heartbeat_checker_thread()

    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """SGLang's, except that it never waits for a server, and one that does not fit fails requests only."""
        if bootstrap_addr in self.prefill_info_table:
            return True
        entry = self._directory.find(bootstrap_addr)
        if entry is None:
            return False
        if entry.refusal:
            self.refusals[bootstrap_addr] = entry.refusal
        with self.connection_lock:
            self.connection_pool.update(entry.ranks)
            self.prefill_info_table[bootstrap_addr] = entry.info
        return True

    def forget_prefill(self, bootstrap_addr: str) -> None:
        """The next request asks the bootstrap server again: a prefill server that is back has other ports."""
        with self.connection_lock:
            for key in [key for key in self.connection_pool if key.startswith(f"{bootstrap_addr}_")]:
                del self.connection_pool[key]
            self.prefill_info_table.pop(bootstrap_addr, None)
            self.refusals.pop(bootstrap_addr, None)

    def refuse_room(self, bootstrap_addr: str, number: int, reason: str) -> None:
        """Tells prefill that this decode server has refused the room's request. A server that none of its requests has
        named yet is not known, and gives the request up by itself.
        """
        info = self.prefill_info_table.get(bootstrap_addr)
        if info is None or number not in ROOMS or bootstrap_addr in self.refusals:
            return
        with self.connection_lock:
            ranks = [
                rank
                for key, all_ in self.connection_pool.items()
                if key.startswith(f"{bootstrap_addr}_")
                for rank in all_
            ]
        with contextlib.suppress(ValueError):  # not the server's ranks for this one
            asker = self.shares(info, [rank["tp_rank"] for rank in ranks]).asker
            addresses = [Address(rank["rank_ip"], rank["rank_port"], rank["key"]) for rank in ranks]
            self.decode_endpoint.refuse(number, addresses, reason, asker=asker)

    def check_status(self, bootstrap_room: int) -> Any:
        """SGLang's; a room that is not known any more has failed. Asked also by the heartbeat's thread, whom a KeyError
        would end.
        """
        return self.request_status.get(bootstrap_room, KVPoll.Failed)

    def submit_prefill_recompute(self, kv_receiver: Any, payload: dict[str, Any]) -> None:
        with fails_alone(kv_receiver):
            super().submit_prefill_recompute(kv_receiver, payload)

    def _handle_node_failure(self, failed_bootstrap_addr: str) -> None:
        super()._handle_node_failure(failed_bootstrap_addr)
        self.forget_prefill(failed_bootstrap_addr)

    def shares(self, prefill: Any, tp_ranks: Sequence[int]) -> Shares:
        """What this decode rank gets from ranks `tp_ranks` of a prefill server, of which SGLang has the layout.

        Raises ValueError when its heads cannot be put together from theirs.
        """
        size = self.attn_tp_size
        return Shares.between(self.kv_args.engine_rank % size, size, tp_ranks, prefill.attn_tp_size, self._num_kv_heads)

    def _set_heads(self, model_config: Any, num_in_pool: int) -> None:
        self._num_kv_heads = model_config.get_total_num_kv_heads()
        self._heads = heads_of(self.kv_args.engine_rank % self.attn_tp_size, self.attn_tp_size, self._num_kv_heads)
        if num_in_pool != len(self._heads):
            raise ValueError(
                f"--disaggregation-transfer-backend {BACKEND} expects {len(self._heads)} of the model's "
                f"{self._num_kv_heads} KV heads on each of {self.attn_tp_size} attention ranks, not {num_in_pool}: "
                "use a tensor parallel size that divides the number of KV heads."
            )

    def _in_layers(self, of_buffers: Sequence[int]) -> list[int]:
        half = len(of_buffers) // 2
        return in_layers([int(value) for value in of_buffers[:half]], [int(value) for value in of_buffers[half:]])

    def _item_lens(self) -> list[int]:
        return self._in_layers(self.kv_args.kv_item_lens)

    def _describe(self, model_config: Any) -> Compat:
        args, config = self.kv_args, model_config.hf_text_config
        architectures = getattr(model_config.hf_config, "architectures", None) or ["unknown"]
        model, digest = describe_model(architectures[0], config.to_dict())
        return Compat(
            model=model,
            model_hash=digest,
            kv_dtype=str(args.kv_cache_dtype_str),
            page_size=args.page_size,
            num_kv_heads=self._num_kv_heads,
            kv_head_lens=[size // len(self._heads) for size in self._item_lens()],
            aux_item_lens=[int(size) for size in args.aux_item_lens],
            prefill_backend=insides.options_of(self.server_args).backend or "",
            reuses_kv=self.disaggregation_mode == DisaggregationMode.DECODE
            and insides.resolved(self.server_args).disaggregation_decode_enable_radix_cache,
        )


@contextlib.contextmanager
def _local_ip(host: str) -> Iterator[None]:
    """SGLang's constructor finds its own address by this variable first, and binds a socket there."""
    before = os.environ.get("SGLANG_HOST_IP")
    os.environ["SGLANG_HOST_IP"] = host
    try:
        yield
    finally:
        if before is None:
            del os.environ["SGLANG_HOST_IP"]
        else:
            os.environ["SGLANG_HOST_IP"] = before


def _check_supported(args: KVArgs, mode: DisaggregationMode, server_args: ServerArgs, is_mla: bool) -> None:
    from sglang.srt.runtime_context import get_parallel

    refused = {
        "pipeline parallelism (--pp-size)": server_args.pp_size > 1,
        "decode context parallelism (--dcp-size)": server_args.dcp_size > 1,
        "context parallelism on the decode server": mode == DisaggregationMode.DECODE
        and get_parallel().attn_cp_size > 1,
        "MLA models": is_mla,
        "models with more state than keys and values (Mamba, sliding window)": bool(args.state_types),
    }
    for what, found in refused.items():
        if found:
            raise ValueError(
                f"--disaggregation-transfer-backend {BACKEND} does not support {what}: use mooncake or nixl."
            )
