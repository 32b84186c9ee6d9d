"""A decode rank: its endpoint, the requests whose KV it waits for, the prefill ranks that it is connected to."""
