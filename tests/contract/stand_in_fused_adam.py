"""A stand-in for Transformer Engine's FusedAdam in plain torch, for the precision-aware optimizer.

It shows to the outside what transformer_engine/pytorch/optimizers/fused_adam.py does: gradients
from `decoupled_grad`, the step counted in the group, fp32 weights in the state of bf16 parameters
only, moments stored in few bits with one scale a tensor. Everything that is computed is fp32.
"""

import torch

# The dtype that holds a state, and what its largest element is scaled to.
_STORAGE = {
    torch.float32: (torch.float32, None),
    torch.bfloat16: (torch.bfloat16, None),
    torch.float16: (torch.float16, torch.finfo(torch.float16).max / 2),
    torch.uint8: (torch.float8_e4m3fn, 448.0),
}


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params,
        *,
        lr,
        weight_decay,
        betas,
        eps,
        capturable,
        adam_w_mode,
        exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32,
        master_weights=False,
        use_decoupled_grad=False,
        master_weight_dtype=torch.float32,
    ):
        assert not capturable and master_weight_dtype == torch.float32
        assert master_weights == use_decoupled_grad
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})
        self.eps, self.adam_w_mode, self.keeps_weights = eps, adam_w_mode, master_weights
        for group in self.param_groups:
            group["eps"] = eps
        self._dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        self._scales = {}

    def get_unscaled_state(self, param, name):
        return self.state[param][name].float() * self._scales.get(param, {}).get(name, 1.0)

    def _store(self, param, name, value):
        dtype, largest = _STORAGE[self._dtypes[name]]
        if largest is not None:
            scale = (value.abs().max() / largest).clamp(min=1e-30)
            # In place, as there.
            kept = self._scales.setdefault(param, {}).setdefault(name, torch.ones(()))
            value = value / kept.copy_(scale)
        if name in self.state[param]:
            self.state[param][name].copy_(value.to(dtype))
        else:
            self.state[param][name] = value.to(dtype)

    def initialize_state(self, param):
        for name in ("exp_avg", "exp_avg_sq"):
            self._store(param, name, torch.zeros_like(param, dtype=torch.float32))
        if self.keeps_weights:
            # Also for an fp32 parameter, which then is stepped itself: a copy that grows stale.
            self.state[param]["master_param"] = param.detach().float().clone()

    def weights(self, param):
        """The fp32 weights that are stepped."""
        bf16 = self.keeps_weights and param.dtype == torch.bfloat16
        return self.state[param]["master_param"] if bf16 else param

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(param)
                grad = param.decoupled_grad if self.keeps_weights else param.grad
                self._step(param, grad.float(), group)

    def _step(self, param, grad, group):
        weights, decay, (beta1, beta2) = self.weights(param), group["weight_decay"], group["betas"]
        if not self.adam_w_mode:
            grad = grad + decay * weights
        first = beta1 * self.get_unscaled_state(param, "exp_avg") + (1 - beta1) * grad
        second = beta2 * self.get_unscaled_state(param, "exp_avg_sq") + (1 - beta2) * grad**2
        root = (second / (1 - beta2 ** group["step"])).sqrt()
        update = first / (1 - beta1 ** group["step"]) / (root + group["eps"])
        if self.adam_w_mode:
            update = update + decay * weights
        weights.sub_(group["lr"] * update)
        param.copy_(weights)
        self._store(param, "exp_avg", first)
        self._store(param, "exp_avg_sq", second)
