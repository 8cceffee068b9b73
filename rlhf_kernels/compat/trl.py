"""TRL's functions on our ops."""

SUPPORTED = ("1.16", "1.17")
REPLACEMENTS: dict[str, object] = {}
