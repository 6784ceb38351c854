"""datatrove steps shared by several stages; `stages.py` combines them."""
