"""Deduplication with datatrove's stages: exact by a hash of the text, near by MinHash; and of lines (lines.py)."""

from datatrove.utils.hashing import HashConfig

# Not datatrove's default, xxhash, whose current release does not accept str.
HASH = HashConfig(precision=64, hash_fc="sha1")
