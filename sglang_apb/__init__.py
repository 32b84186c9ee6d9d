"""sglang-apb: APB sparse-attention prefill and direct KV transfer, as a plugin of SGLang 0.5.23."""

__version__ = "0.1.0"
