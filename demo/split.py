"""Held-out splits by hash: the same document always falls on the same side."""

import hashlib


def held_out(key: str, share: int = 50) -> bool:
    """Whether `key` belongs to the held-out part, about one in `share` of all keys."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % share == 0
