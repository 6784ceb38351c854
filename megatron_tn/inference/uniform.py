"""Keys of the random numbers for sampling, one for each (seed, request). See `kernels.sampling.uniform`."""

import hashlib


def stream_key(seed: int, request: int) -> int:
    """The int64 key of a request's stream of numbers: 64 bits of SHA-256."""
    digest = hashlib.sha256(f"{seed}/{request}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
