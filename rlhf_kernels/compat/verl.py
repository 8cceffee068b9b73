"""verl's functions on our ops."""

SUPPORTED = ("0.9", "0.10")
REPLACEMENTS: dict[str, object] = {}
