"""What a KV cache holds, in figures."""

from typing import Literal

from msgspec import Struct

Tier = Literal["device", "host", "none"]
"""Where K/V is: in the memory of the device that computes, in the host's, or nowhere."""


class CacheCounters(Struct, frozen=True, kw_only=True):
    """The KV cache of one model.

    Now: blocks of the device in all, those that running sequences hold, those that can be found by
    content (held or not), and those that are neither. ``blocks_shared`` is how many more would be
    held if sequences shared none. Where the device is the CPU there are no host blocks.
    ``sequences`` run or wait for a place in the batch.

    Since the model was loaded, in blocks: ``hits`` were found instead of computed (``restores`` of
    them on the host), ``misses`` had to be computed, ``evictions`` had to leave the device.
    """

    block_tokens: int
    block_bytes: int
    blocks_capacity: int
    blocks_held: int
    blocks_cached: int
    blocks_free: int
    blocks_shared: int
    host_blocks_capacity: int
    host_blocks_cached: int
    hits: int
    misses: int
    evictions: int
    restores: int
    sequences: int
    sequences_waiting: int
