"""What prefixes and features have given and hold. Plain data, for /metrics and /v1/cache/stats."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrefixStats:
    """Counters grow for the life of the cache; bytes are of now."""

    num_queries: int = 0
    """Requests that looked for a prefix."""
    num_hits: int = 0
    """Requests that found one."""
    num_query_tokens: int = 0
    """Tokens that they could have found: all of a prompt but its last."""
    num_hit_tokens: int = 0
    """Tokens that they found, and nobody computed."""
    num_disk_hit_tokens: int = 0
    """Of those, the ones that were read from disk."""
    num_evicted: int = 0
    """Segments that left memory for others."""
    num_disk_evicted: int = 0
    """Segments that left the disk for others."""
    disk_bytes: int = 0
    num_segments: int = 0
    """Pieces of text that are kept, in memory or on disk."""
    num_disk_dropped: int = 0
    """Segments that were not written, for the disk could not keep up."""
    num_disk_errors: int = 0
    """Files that could not be written or read, or were not whole."""


@dataclass(frozen=True)
class FeatureStats:
    """Of what towers made of pictures. Counters grow for the life of the cache; bytes are of now."""

    num_queries: int = 0
    """Pictures whose tokens were to be computed."""
    num_hits: int = 0
    """Of those, the ones that needed no encoding."""
    num_disk_hits: int = 0
    """Of those, the ones whose features were read from disk."""
    num_encoded: int = 0
    """Times that a picture went through the tower."""
    num_evicted: int = 0
    """Pictures whose features left memory for others'."""
    num_disk_evicted: int = 0
    num_kept: int = 0
    """Pictures whose features are kept, in memory or on disk."""
    disk_bytes: int = 0
    num_disk_dropped: int = 0
    """Not written, for the disk could not keep up."""
    num_disk_errors: int = 0
    """Files that could not be written or read, or were not whole."""
