"""GPU kernels, each beside a plain torch reference that says the same."""
