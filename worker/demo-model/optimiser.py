"""Muon for the matrices of attention and experts; AdamW is used for everything else."""
import torch


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalised updates (five Newton-Schulz steps), for matrices [..., rows, columns].

    Parameters of equal shape are updated together.
    """

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.01):
        groups = {}
        for p in parameters:
            groups.setdefault(tuple(p.shape), []).append(p)
        super().__init__([{"params": group} for group in groups.values()], dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            grads = torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grads)
            buffer = state["momentum"].lerp_(grads, 1 - group["momentum"])
            update = orthogonal(grads.lerp(buffer, group["momentum"]))
            rows, columns = update.shape[-2:]
            scale = group["lr"] * max(1.0, rows / columns, columns / rows) ** 0.5
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.unbind(0)), alpha=-scale)


def orthogonal(x):
    """The nearest matrix with singular values near 1, by Newton-Schulz iteration in bfloat16 on a GPU."""
    tall = x.shape[-2] > x.shape[-1]
    dtype = x.dtype
    if x.is_cuda:
        x = x.bfloat16()
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).to(dtype)
