"""GPU operators of TransNormerLLM and of its rival, a Transformer, each with a plain PyTorch form that runs anywhere.

The public functions are below; their docstrings are the reference. Needs torch alone; Triton is used where installed.
"""

from kernels.adamw.op import adamw_
from kernels.cross_entropy.op import linear_cross_entropy
from kernels.decoding_check import decoding_check
from kernels.dispatch import set_backend
from kernels.embedding.op import scaled_embedding
from kernels.gla.op import gla
from kernels.gla.slice import StateExchange, gla_slice
from kernels.lightning.op import lightning_attention
from kernels.muon.op import muon_apply_, muon_direction_
from kernels.newton_schulz.op import equalize_norms_, newton_schulz
from kernels.rmsnorm.op import add_rms_norm, branch_rms_norm
from kernels.rope.op import rope
from kernels.sampling.op import sample_tokens
from kernels.self_check import StepSizes, self_check
from kernels.sglu.op import sglu
from kernels.srmsnorm.op import (
    add_scaled_simple_rms_norm,
    add_simple_rms_norm,
    branch_simple_rms_norm,
    simple_rms_norm,
)
from kernels.token.op import token_glu, token_linear

# Hugging Face transformers takes any package named `kernels` for its kernel hub client and reads its version, from the
# distribution's metadata or from here. A version below its minimum: the hub client counts as not installed.
__version__ = "0.0.0"
