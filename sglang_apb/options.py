"""The plugin's command line: which options there are, and which SGLang options cannot go with them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from sglang_apb import attention, backends, config, settings
from sglang_apb.host_group import FirstHost
from sglang_apb.transfer.protocol import hosts, keys
from sglang_apb.transfer.protocol.config import BACKEND, TransferConfig
from sglang_apb.transfer.protocol.config import OPTION as TRANSFER_OPTION

_NO_PLUGINS: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "tokenizer_worker_num": ((1,), "--tokenizer-worker-num", "its processes load no plugins"),
    "use_ray": ((False,), "--use-ray", "its processes load no plugins"),
}
# ServerArgs field -> (value that goes together with a sparse prefill, its option, why others do not)
_REFUSED_FIELDS: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "enable_mixed_chunk": ((False,), "--enable-mixed-chunk", "it merges decodes into the prefill batch"),
    "enable_lora": ((None, False), "--enable-lora", "adapters are loaded per tensor-parallel rank"),
    "speculative_algorithm": ((None,), "--speculative-algorithm", "the draft model needs exact hidden states"),
    "pp_size": ((1,), "--pp-size", "a prompt is laid out over ranks that each hold every layer"),
    "dp_size": ((1,), "--dp-size", "start one server a replica, and the router in front"),
    "attn_dp_size": ((1,), "--attn-dp-size", "it splits requests where we split the prompt"),
    "dcp_size": ((1,), "--dcp-size", "the KV of a decoding request must stand on one rank"),
    "enable_hierarchical_cache": ((False,), "--enable-hierarchical-cache", "sparse contexts are kept on the GPU"),
    "enable_lmcache": ((False,), "--enable-lmcache", "its cache does not keep sparse contexts apart"),
    "enable_flexkv": ((False,), "--enable-flexkv", "its cache does not keep sparse contexts apart"),
    "kv_events_config": ((None, ""), "--kv-events-config", "events do not tell sparse contexts from exact ones"),
    "enable_kv_cache_sharding": ((False,), "--enable-kv-cache-sharding", "ranks own blocks, not stripes of pages"),
    "disaggregation_enable_kv_checksum": (
        (False,),
        "--disaggregation-enable-kv-checksum",
        "no rank holds all of a prompt's pages",
    ),
    "optimistic_prefill_attempts": (
        (0,),
        "--optimistic-prefill-attempts",
        "layers are sent while later ones are computed",
    ),
    "enable_prefill_cp": ((False,), "--enable-prefill-cp", "use --sp-size"),
    "enable_pdmux": ((False,), "--enable-pdmux", "it splits the prefill's layers into several forwards"),
    "enable_two_batch_overlap": ((False,), "--enable-two-batch-overlap", "a sparse prompt is alone in its batch"),
    "dllm_algorithm": ((None,), "--dllm-algorithm", "diffusion models have no prefill"),
    "enable_hisparse": ((False,), "--enable-hisparse", "it keeps part of the KV off the GPU"),
    "kv_cache_dtype": (("auto", "bf16", "bfloat16"), "--kv-cache-dtype", "quantised KV is not supported yet"),
    "schedule_policy": (
        ("fcfs", "lpm", "random", "dfs-weight", "lof", "priority", "routing-key", "hrrn"),
        "--schedule-policy",
        "it keeps room in a long prompt's batch for short ones, and a sparse prompt runs in a batch of its own",
    ),
    **_NO_PLUGINS,
}
# The same for our KV transfer, with or without a prefill backend.
_REFUSED_WITH_TRANSFER: dict[str, tuple[tuple[Any, ...], str, str]] = {
    **_NO_PLUGINS,
    "pp_size": ((1,), "--pp-size", "a rank sends every layer of the pages that it holds"),
    "dcp_size": ((1,), "--dcp-size", "a request's KV goes to whole pages of one rank"),
    "enable_kv_cache_sharding": ((False,), "--enable-kv-cache-sharding", "ranks send whole parts of a prompt"),
    "enable_hisparse": ((False,), "--enable-hisparse", "it takes KV in host memory, and ours goes to the pool"),
    "disaggregation_decode_host_receive_threshold": (
        (1,),
        "--disaggregation-decode-host-receive-threshold",
        "it takes KV in host memory, and ours goes to the pool",
    ),
    "enable_pd_role_switch": ((False,), "--enable-pd-role-switch", "its connections are made for one role"),
}
# Of our radix cache (patches/context_cache.py).
CONTEXT_CACHE = "sglang-apb"
_TRANSFER = f"--disaggregation-transfer-backend {BACKEND}"
# Their draft model's KV is a second pool, which the other server must get too.
_DRAFT_POOLS = ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE", "DFLASH", "DSPARK")

# Dense decoders whose layers call one attention with per-head K and V, as SGLang names them.
MODEL_FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class OptionError(ValueError):
    """Options that cannot work together, or on this machine; the text says which and what to do."""


@dataclass(frozen=True)
class PluginOptions:
    """What the command line says of us. `backend` None: no option of ours was used."""

    backend: str | None = None
    sp_size: int = 1
    config_text: str | None = None
    transfer_text: str | None = None

    @property
    def is_set(self) -> bool:
        return self.backend is not None

    def check(self) -> None:
        """What can be checked before SGLang resolves its own arguments. Raises OptionError, ConfigError."""
        if self.backend is None and (self.sp_size != 1 or self.config_text is not None):
            raise OptionError("--sp-size and --prefill-backend-config need --prefill-backend, for example apb")
        if self.sp_size < 1:
            raise OptionError(f"--sp-size must be at least 1, not {self.sp_size}")
        if self.backend is not None:
            backends.check_name(self.backend)
            config.parse(self.config_text)
        self.transfer()

    def transfer(self) -> TransferConfig:
        """Raises ConfigError."""
        return settings.parse(TRANSFER_OPTION, self.transfer_text, TransferConfig, {})


def add_to_parser(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sglang-apb")
    group.add_argument(
        "--prefill-backend",
        choices=backends.NAMES,
        default=None,
        help="Prefill long prompts with this method; shorter ones and decode stay SGLang's.",
    )
    group.add_argument(
        "--sp-size",
        type=int,
        default=1,
        help="Sequence-parallel ranks that share one prompt's prefill; each holds the whole model.",
    )
    group.add_argument(
        "--prefill-backend-config",
        default=None,
        help=f"JSON object, file, or preset ({', '.join(config.PRESETS)}) with the method's lengths. "
        + config.describe().replace("%", "%%"),
    )
    group.add_argument(
        TRANSFER_OPTION,
        default=None,
        help="JSON object or file for --disaggregation-transfer-backend zmq. " + settings.describe(TransferConfig),
    )


def check_transfer(server_args: Any, options: PluginOptions) -> None:
    """Refuses, after SGLang resolved its options, to send KV off this machine without keys.

    Raises OptionError, ConfigError.
    """
    if not uses_transfer(server_args):
        if options.transfer_text is not None:
            raise OptionError(
                f"{TRANSFER_OPTION} needs --disaggregation-transfer-backend {BACKEND}, and --disaggregation-mode "
                "prefill or decode"
            )
        return
    transfer = options.transfer()
    if keys.load(transfer) or transfer.allow_unencrypted or server_args.disaggregation_mode == "decode":
        return  # a decode server listens nowhere, and checks each prefill server that it connects to
    address = hosts.listening_host(server_args.host)
    if not hosts.is_loopback(address):
        raise OptionError(
            f"--host {server_args.host} would send KV unencrypted from {address}: make keys with `sglang-apb keys` and "
            f"give them with {TRANSFER_OPTION}; if nobody else is on that network, "
            f"""give {TRANSFER_OPTION} '{{"allow_unencrypted": true}}'"""
        )


def check_transferable(server_args: Any, model_config: Any, transfer: TransferConfig) -> None:
    """Refuses, after SGLang resolved them, options with which our transfer does not work, where it is used, and a port
    for its bootstrap server or its ranks that is taken.

    model_config: SGLang's ModelConfig. Raises OptionError with one sentence.
    """
    _refuse(server_args, _REFUSED_WITH_TRANSFER, _TRANSFER)
    _check_generates(model_config, _TRANSFER)
    if server_args.speculative_algorithm in _DRAFT_POOLS:
        raise OptionError(
            f"--speculative-algorithm {server_args.speculative_algorithm} does not go with {_TRANSFER}: its draft "
            "model has a KV pool of its own, which is not sent; leave it out, or use mooncake or nixl"
        )
    if server_args.disaggregation_mode == "prefill":
        _check_bootstrap_port(server_args)
        _check_transfer_ports(server_args, transfer.port)
    elif server_args.attn_cp_size > 1:
        raise OptionError(
            f"--attn-cp-size {server_args.attn_cp_size} on a decode server does not go with {_TRANSFER}: each of its "
            "ranks must hold whole prompts; leave it out"
        )


def uses_transfer(server_args: Any) -> bool:
    return server_args.disaggregation_transfer_backend == BACKEND and server_args.disaggregation_mode != "null"


def ships_own_pages(server_args: Any) -> bool:
    """Whether this is a prefill server over our transfer, each rank of which sends pages of its own."""
    return uses_transfer(server_args) and server_args.disaggregation_mode == "prefill"


def check_front(server_args: Any, options: PluginOptions, *, is_rust: bool) -> None:
    """Refuses, before SGLang resolves its options, its HTTP server in Rust: no hook of ours runs there.

    Raises OptionError.
    """
    ours = f"--prefill-backend {options.backend}" if options.is_set else _TRANSFER
    if is_rust and (options.is_set or uses_transfer(server_args)):
        raise OptionError(f"SGLANG_RUST_SERVER does not go with {ours}: that server runs no plugins; unset it")


def check_parallel_sizes(server_args: Any, sp_size: int) -> None:
    """Refuses, before SGLang resolves its options, other ranks beside those of `--sp-size`. Raises OptionError."""
    for name in ("tp_size", "attn_cp_size"):
        if getattr(server_args, name) not in (None, 1, sp_size):
            raise OptionError(
                f"--sp-size {sp_size} does not go with --{name.replace('_', '-')} {getattr(server_args, name)}: "
                "leave one of them out"
            )


def check_hosts(server_args: Any, sp_size: int) -> FirstHost | None:
    """Refuses, before SGLang resolves its options, hosts that cannot share the ranks. Gives the first of them; None
    where there is only one. Raises OptionError, HostGroupError.
    """
    num_hosts, number = server_args.nnodes, server_args.node_rank
    if num_hosts == 1:
        return None
    if sp_size % num_hosts:
        raise OptionError(
            f"--sp-size {sp_size} cannot be shared out over --nnodes {num_hosts}: give each host as many ranks, "
            f"for example --sp-size {num_hosts * max(round(sp_size / num_hosts), 1)}"
        )
    if not 0 <= number < num_hosts:
        raise OptionError(f"--node-rank {number} must be 0 to {num_hosts - 1}, another one on each of the hosts")
    if server_args.dist_init_addr is None:
        raise OptionError(f"--nnodes {num_hosts} needs --dist-init-addr HOST:PORT, the first host's, the same on all")
    first = FirstHost.parse(server_args.dist_init_addr)
    if (
        uses_transfer(server_args)
        and hosts.is_loopback_host(server_args.host)
        and not hosts.is_loopback_host(first.host)
    ):
        raise OptionError(
            f"--host {server_args.host} listens to this host alone, and ranks of other hosts register at "
            f"{first.host}: give --host an address of this host's"
        )
    return first


def check_server_args(server_args: Any, model_config: Any, options: PluginOptions) -> None:
    """Refuses, after SGLang resolved them, options that would silently disable or break the layout.

    model_config: SGLang's ModelConfig. Raises OptionError with one sentence.
    """
    _refuse(server_args, _REFUSED_FIELDS, f"--prefill-backend {options.backend}")
    if server_args.disaggregation_mode == "decode":
        raise OptionError(
            f"--prefill-backend {options.backend} belongs on the prefill server: a decode server does no prefill, "
            "leave it out there"
        )
    _check_generates(model_config, f"--prefill-backend {options.backend}")
    _check_model(server_args, model_config)
    _check_engine(server_args, model_config, options)
    _check_gpus(server_args, options)
    _check_cache(server_args, options)


def _check_cache(server_args: Any, options: PluginOptions) -> None:
    """Where ranks keep their own blocks, our radix cache alone knows what the slots of a prompt hold."""
    keeps_parts = options.sp_size > 1 and ships_own_pages(server_args)
    if keeps_parts and server_args.radix_cache_backend != CONTEXT_CACHE:
        given = server_args.radix_cache_backend
        option = f"--radix-cache-backend {given}" if given else "--enable-unified-cache-external-linker"
        raise OptionError(
            f"{option} does not go with --sp-size {options.sp_size} and {_TRANSFER}, whose ranks each keep a part of a "
            "prompt: leave it out"
        )


def _refuse(server_args: Any, fields: dict[str, tuple[tuple[Any, ...], str, str]], ours: str) -> None:
    for field, (allowed, option, why) in fields.items():
        value = getattr(server_args, field)
        if value not in allowed:
            raise OptionError(f"{option} ({value!r}) does not go with {ours}: {why}; leave it out")


def _check_generates(model: Any, ours: str) -> None:
    if not model.is_generation:
        raise OptionError(
            f"a server of embeddings ({model.hf_config.architectures}, --is-embedding) does not go with {ours}, which "
            "is for prompts that are answered with tokens: leave one of them out"
        )


def _check_bootstrap_port(server_args: Any) -> None:
    """A bootstrap server that cannot listen leaves a server healthy of which no decode server ever hears, and its ranks
    registered with whatever listens there instead.
    """
    if server_args.node_rank != 0:
        return  # the first node has it
    port = server_args.disaggregation_bootstrap_port
    if not 0 < port < 65536:
        raise OptionError(f"--disaggregation-bootstrap-port {port} is no port: choose one from 1 to 65535")
    if port == server_args.port:
        raise OptionError(f"--disaggregation-bootstrap-port {port} is --port, too: choose another for one of them")
    if why := hosts.why_not_free(server_args.host, port):
        raise OptionError(bootstrap_port_taken(port, why))


def _check_transfer_ports(server_args: Any, first: int) -> None:
    """A rank that cannot listen would end the server after its weights are loaded."""
    if first == 0:
        return
    others = {server_args.port: "--port", server_args.disaggregation_bootstrap_port: "--disaggregation-bootstrap-port"}
    for port in range(first, first + max(server_args.tp_size // server_args.nnodes, 1)):
        if why := f"is {others[port]}, too" if port in others else _why_no_port(server_args.host, port):
            raise OptionError(
                f"port {port} of a prefill rank, from {TRANSFER_OPTION}'s port {first} on, cannot be used ({why}): "
                "give another one"
            )


def _why_no_port(host: str, port: int) -> str:
    return "the last one is 65535" if port > 65535 else hosts.why_not_free(host, port)


def bootstrap_port_taken(port: int, why: str) -> str:
    return (
        f"port {port} for the bootstrap server is not free ({why}): end what listens there, or give another "
        "--disaggregation-bootstrap-port"
    )


def _check_model(server_args: Any, model: Any) -> None:
    architectures = model.hf_config.architectures or ["unknown"]
    if architectures[0] not in MODEL_FAMILIES:
        raise OptionError(
            f"--prefill-backend does not support {architectures[0]} ({server_args.model_path}); "
            f"supported: {', '.join(MODEL_FAMILIES)}"
        )


def _check_engine(server_args: Any, model: Any, options: PluginOptions) -> None:
    engine = config.parse(options.config_text).engine
    try:
        attention.choose(engine, server_args.device, model.dtype, model.head_dim)
    except attention.EngineError as error:
        raise OptionError(f"--prefill-backend-config: {error}") from None


def _check_gpus(server_args: Any, options: PluginOptions) -> None:
    if server_args.device != "cuda":
        return
    import torch

    num_gpus, num_hosts = torch.cuda.device_count(), server_args.nnodes
    num_ranks = options.sp_size // num_hosts
    needed = server_args.base_gpu_id + num_ranks * server_args.gpu_id_step
    if needed > num_gpus:
        most = max(num_gpus - server_args.base_gpu_id, 1) * num_hosts
        raise OptionError(
            f"--sp-size {options.sp_size} needs {num_ranks} GPUs of each host from number {server_args.base_gpu_id} "
            f"on, and this one has {num_gpus}: use --sp-size {most} or less"
        )
