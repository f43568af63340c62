"""Which config a call gets: the user's own cache, the shipped table of the card, or the heuristic.

directory.py   where the user's cache lies
table.py       rows, file format, the rule of the nearest batch and length
shipped.py     the tables of this package, sm80.json to sm120.json
store.py       the user's cache: read with warnings, written whole
lookup.py      from a problem to a config, with the reason
"""

from mla_triton.configs.directory import cache_directory
from mla_triton.configs.lookup import Choice, choose, forget, length_bucket, tables

__all__ = ["Choice", "cache_directory", "choose", "forget", "length_bucket", "tables"]
