"""A stand-in for NVIDIA's apex, which is built from source where it is wanted."""

import torch


class FusedAdam(torch.optim.Optimizer):
    """The interface of apex.optimizers.FusedAdam in plain torch: moments per parameter, the step per group."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0):
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                unbiased = state["exp_avg_sq"] / (1 - second ** group["step"])
                p.addcdiv_(
                    state["exp_avg"], unbiased.sqrt() + group["eps"], value=-group["lr"] / (1 - first ** group["step"])
                )
