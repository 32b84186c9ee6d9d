"""Which tokens of a block are worth handing on: one file a scorer."""

SELECTORS = ("query",)
