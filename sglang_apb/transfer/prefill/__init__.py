"""A prefill rank: its endpoint, the requests whose KV it sends, the decode ranks that are connected."""
