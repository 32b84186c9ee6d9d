"""How pages move: each data plane is one file, and `base.py` says what one is."""
