"""Activation functions by name: of q and k (`kernels.gla`), and of SGLU's gate (`kernels.sglu`, `kernels.token_glu`).

To add one, add its name to the three tables here: `plain.py` (function and derivative, PyTorch), `reference.py` (the
definition), `triton_activations.py` (both as Triton). No kernel names an activation. The settings model.act and
model.glu_act take it once it is in `Act` of megatron_tn/config/model.py; an export, once it is in `ACTIVATIONS` of
megatron_tn/released/modeling_transnormer.py, which stands alone.
"""
