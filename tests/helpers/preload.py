"""What every rank of `run_ranks` needs, imported once in the fork server: a rank then starts in a tenth of a second."""

import gc

import torch._inductor.compile_fx  # noqa: F401 (PyTorch's compiler: four seconds, when the first optimizer is made)

import megatron_tn.checkpoint.load
import megatron_tn.checkpoint.save
import megatron_tn.engine.build
import megatron_tn.engine.deepspeed.engine
import megatron_tn.train  # noqa: F401

gc.freeze()  # collections in a rank then need not look at (and copy) what the server imported
