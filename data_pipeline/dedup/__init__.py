"""Duplicates: exact by hash of the text, near by MinHash. Both are datatrove's, set up here."""

from datatrove.utils.hashing import HashConfig

# Not datatrove's default, xxhash, whose current release takes no str.
HASH = HashConfig(precision=64, hash_fc="sha1")
