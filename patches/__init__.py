"""Every place where sglang-apb touches SGLang: one file a seam, each with its target and its reason."""
