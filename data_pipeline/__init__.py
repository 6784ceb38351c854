"""From raw text to clean, tokenised tar shards (`run`), and from those to an exactly resumable stream (`stream`)."""
