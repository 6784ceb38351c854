"""Self-cleaning (arXiv 2307.14995, section 4): score documents by a model, and keep a band of scores."""
