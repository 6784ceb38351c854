"""From raw text to clean, tokenised tar shards (`run`), and from shards to an exactly resumable stream (`stream`)."""
