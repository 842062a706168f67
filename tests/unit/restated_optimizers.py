"""A literal re-statement of torch's SGD, Adam and AdamW in float64, to be differentiated."""

import torch

LR, BETAS, SIZE = 0.01, (0.9, 0.95), 12


def gradients(steps, seed=0):
    """A history `[t, SIZE]` that spans six orders of magnitude and both signs."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-4, 2, SIZE, dtype=torch.float64)
    return torch.randn(steps, SIZE, generator=generator, dtype=torch.float64) * scale


def start():
    return torch.linspace(-1, 1, SIZE, dtype=torch.float64)


def sgd_step(
    grad, theta, buffer, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0, lr=LR
):
    """One step of `torch.optim.SGD`: theta+ and the momentum buffer, None before the first."""
    grad = grad + weight_decay * theta
    if momentum:
        buffer = grad if buffer is None else momentum * buffer + (1 - dampening) * grad
        grad = grad + momentum * buffer if nesterov else buffer
    return theta - lr * grad, buffer


def adam_step(grad, theta, state, eps=1e-8, weight_decay=0.0, decoupled=True, lr=LR):
    """One step of `torch.optim.AdamW` (decoupled) or `Adam`: theta+ and (m, v, t)."""
    m, v, t = state or (torch.zeros_like(theta), torch.zeros_like(theta), 0)
    t = t + 1
    if decoupled:
        theta = theta - lr * weight_decay * theta
    else:
        grad = grad + weight_decay * theta
    m = BETAS[0] * m + (1 - BETAS[0]) * grad
    v = BETAS[1] * v + (1 - BETAS[1]) * grad**2
    m_hat, v_hat = m / (1 - BETAS[0] ** t), v / (1 - BETAS[1] ** t)
    return theta - lr * m_hat / (v_hat.sqrt() + eps), (m, v, t)


def clipped(grad, max_norm):
    """Megatron's clipping: `g min(1, C / (|g| + 1e-6))`; None switches it off."""
    if max_norm is None:
        return grad
    return grad * torch.clamp(max_norm / (grad.norm() + 1e-6), max=1.0)


def walk(step, history, options):
    theta, state = start(), None
    for grad in history:
        theta, state = step(grad, theta, state, **options)
    return theta, state


def last_step(step, history, options, max_norm=None):
    """The last step over a history, differentiated by the gradient before clipping.

    Returns:
        `d theta+ / dG`, `[SIZE, SIZE]`; the parameter before it; the state after it.
    """
    theta, state = walk(step, history[:-1], options)

    def of_gradient(grad):
        return step(clipped(grad, max_norm), theta, state, **options)[0]

    matrix = torch.autograd.functional.jacobian(of_gradient, history[-1])
    return matrix, theta, step(clipped(history[-1], max_norm), theta, state, **options)[1]


def torch_optimizer(step, options):
    """The real optimizer of a re-stated step and its options."""
    options = dict(options)
    if step is sgd_step:
        return lambda p: torch.optim.SGD(p, lr=LR, **options)
    kind = torch.optim.AdamW if options.pop("decoupled", True) else torch.optim.Adam
    return lambda p: kind(p, lr=LR, betas=BETAS, **{"weight_decay": 0.0, **options})


def stepped(make, history, dtype=torch.float64):
    """A parameter that a real torch optimizer has walked over a history, and the optimizer."""
    parameter = torch.nn.Parameter(start().to(dtype))
    optimizer = make([parameter])
    for grad in history.to(dtype):
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter, optimizer


SGD_OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
]
DAMPENED = {"momentum": 0.8, "dampening": 0.3}
ADAM_OPTIONS = [
    {"eps": eps, "weight_decay": decay, "decoupled": decoupled}
    for eps in (1e-15, 1e-8, 1e-3, 1.0)
    for decay, decoupled in ((0.0, True), (0.1, True), (0.1, False))
]


def is_diagonal(matrix, diagonal, slack=0.0, rtol=1e-9):
    """Whether a matrix is `diag(diagonal)` up to `rtol` and an absolute slack for each element."""
    diagonal = torch.as_tensor(diagonal, dtype=matrix.dtype).expand(SIZE)
    off = matrix - torch.diag(matrix.diagonal())
    error = (matrix.diagonal() - diagonal).abs()
    return not off.any() and bool((error <= rtol * matrix.diagonal().abs() + slack).all())


def known_to_sgd(options):
    return {k: v for k, v in options.items() if k != "weight_decay"}
