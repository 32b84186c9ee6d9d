"""Pages of a KV pool: in host memory, on a GPU, by KV heads."""
