"""OpenRLHF's functions and losses on our ops."""

SUPPORTED = ("0.11", "0.12")
REPLACEMENTS: dict[str, object] = {}
