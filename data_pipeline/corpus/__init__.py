"""A corpus of free packages' text, each package pinned by version and hash, in parts that can travel one by one."""
