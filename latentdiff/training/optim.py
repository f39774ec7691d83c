"""How do weights move? AdamW, its learning-rate schedule, its state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.configtraining import OptimizerConfig


def lr_at(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of optimiser step `step` (from 0): linear warm-up, then the decay."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    span = max(1, num_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    kept = 0.5 * (1 + math.cos(math.pi * progress)) if config.decay == "cosine" else 1 - progress
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * kept)


def make_adamw(modules: Mapping[str, nn.Module], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over named modules; norms and biases (below two dimensions) don't decay."""
    decayed, plain = [], []
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                (decayed if parameter.ndim >= 2 else plain).append((f"{prefix}.{name}", parameter))
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )


def named_trainable(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """`module.parameter` -> parameter, of all that are trained."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def step_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    lr: float,
    config: OptimizerConfig,
) -> Tensor:
    """One clipped step at the given rate; clears gradients and returns their norm (on device)."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), limit)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimiser's state as `parameter.key` -> tensor, for safetensors."""
    return {
        f"{name}.{key}": value.detach()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Inverse of `optimizer_tensors`."""
    for name, parameter in parameters.items():
        state: dict[str, Any] = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (value := tensors.get(f"{name}.{key}")) is not None:
                state[key] = value if key == "step" else value.to(parameter.device)
        if state:
            optimizer.state[parameter] = state
