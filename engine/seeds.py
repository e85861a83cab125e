"""Seeds of what is drawn, from the places where it is drawn."""

import hashlib


def noise_seed(seed: int, step: int, micro_batch: int) -> int:
    """Hash a place to 63 bits, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
