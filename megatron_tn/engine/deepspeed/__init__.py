"""engine=zero0 .. zero3: DeepSpeed ZeRO. adapter.py alone imports deepspeed."""
