"""The released layout, both ways: config.json, weights, tokenizer files, README card, and the modelling file for
transformers that every export carries (`modeling_transnormer.py`: copied, never imported here)."""
