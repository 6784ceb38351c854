"""datatrove steps that several stages of the pipeline share. Stages are made of them in `stages.py`."""
