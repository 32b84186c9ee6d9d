"""Several hosts, described in one file: what stands on each of them, at which ports, with which keys."""
