"""How do weights move? The optimisers, their learning rate, one step, their state as tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from latentdiff.configtraining import OptimizerConfig

# Tables of vectors are looked up, not multiplied with: no matrices to Muon. Their usual names.
_TABLE = re.compile(r"(embed\w*|shared|relative_attention_bias)(\.weight)?$")
_PARTS = ("codes", "scale")  # of a state in 8 bits, besides constants


def lr_at(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of optimiser step `step` (from 0): linear warm-up, then the decay.

    Raises:
        ValueError: warm-up and decay of wsd do not fit into `num_steps`.
    """
    first = config.warmup_steps  # step with which the decay begins
    if config.decay_steps is not None:
        first = num_steps - config.decay_steps
        if first < config.warmup_steps:
            raise ValueError(
                f"optimizer.warmup_steps {config.warmup_steps} and decay_steps "
                f"{config.decay_steps} must fit into the run's {num_steps} steps; shorten one"
            )
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    progress = min(1.0, max(0, step - first) / max(1, num_steps - first))
    kept = 0.5 * (1 + math.cos(math.pi * progress)) if config.decay == "cosine" else 1 - progress
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * kept)


def named_trainable(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """`module.parameter` -> parameter, of all that are trained."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> Optimizer:
    """The optimiser of `config` over named parameters, with all its state, which is zero.

    - adamw: AdamW (Loshchilov & Hutter 2019), fused: it can skip a step on the device.
    - adamw8bit: AdamW with state in blocks of 256 8-bit numbers (Dettmers et al. 2022), by
      torchao. It compiles its step for each shape at the first one.
    - adafactor: Shazeer & Stern 2018; a step is at most `lr` times the weights' root mean square.
    - muon: matrices by Muon (Jordan et al. 2024) with updates of AdamW's size (Liu et al. 2025,
      section 2.2), so that both have one rate; kernels, tables of vectors, norms and biases by
      AdamW.

    Args:
        parameters: `module.parameter` -> parameter; already sharded, if they will be.
        config: its kind, rate, decay and groups.

    Raises:
        ValueError: a group has no parameter, or torchao is not installed.
    """
    groups, matrices = _groups(parameters, config)
    optimizer: Optimizer
    if config.kind == "adamw":
        optimizer = _adamw(groups, config)
    elif config.kind == "adamw8bit":
        optimizer = _adamw8bit(groups, config)
    elif config.kind == "adafactor":
        optimizer = torch.optim.Adafactor(groups, lr=config.lr)
    else:
        members: list[Optimizer] = [_adamw(groups, config)] if groups else []
        if matrices:
            muon = torch.optim.Muon(matrices, lr=config.lr, adjust_lr_fn="match_rms_adamw")
            members.append(muon)
        optimizer = _Together(members)
    # torchao's step would be compiled for nothing
    eager = torch.compiler.set_stance("force_eager") if config.kind == "adamw8bit" else None
    with eager or nullcontext():
        materialize(optimizer)
    return optimizer


def check_sharded(kind: str) -> None:
    """Refuse an optimiser that cannot step sharded parameters.

    Measured with FSDP2 on two ranks: Adafactor's means over rows and columns and Muon's products
    of whole matrices would change the sharding in place, which DTensor refuses. AdamW8bit compiles
    one rank's shapes for all, and what it holds in 8 bits depends on the number of ranks.

    Raises:
        ValueError: it is not adamw.
    """
    if kind != "adamw":
        raise ValueError(
            f"optimizer.kind {kind} cannot step the sharded weights of parallel.mode fsdp; set "
            "optimizer.kind=adamw, or parallel.mode=ddp"
        )


@torch.no_grad()
def step_optimizer(
    optimizer: Optimizer,
    parameters: Iterable[nn.Parameter],
    norm: Tensor,
    skip: Tensor | None,
    lr: float,
    config: OptimizerConfig,
) -> None:
    """One step with gradients clipped by their global norm, unless skipped; clears gradients.

    A skipped step leaves weights and state as they are, bit for bit. Of AdamW (kind adamw) neither
    clipping nor skipping waits for the device; the other kinds read `skip` on the host.

    Args:
        optimizer: of `build_optimizer`.
        parameters: all that it moves.
        norm: [] L2 norm of all gradients, over all shards and ranks.
        skip: [] float32: 1 for a step that is not taken, 0 for one that is; None: it is.
        lr: rate; each group's is this times its `lr_scale`.
        config: for the largest norm.
    """
    parameters = list(parameters)
    for group in optimizer.param_groups:
        rate = lr * group["lr_scale"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)  # torchao insists on its own tensor
        else:
            group["lr"] = rate
    excess = None  # what gradients are divided by
    if config.max_grad_norm is not None:
        # g * min(1, max_norm / (|g| + 1e-6)), as torch.nn.utils.clip_grad_norm_
        excess = ((norm.float() + 1e-6) / config.max_grad_norm).clamp(min=1)
    if isinstance(optimizer, torch.optim.AdamW):
        _step_fused(optimizer, excess, skip, parameters[0].device)
    elif skip is None or skip.item() != 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        if excess is not None and gradients:
            torch._foreach_div_(gradients, excess)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def materialize(optimizer: Optimizer) -> None:
    """Make the state of parameters that have none yet: zero, before the first step.

    Checkpoints are loaded into tensors that exist. Which ones each optimiser alone knows, so that
    it takes a step with a twin of every parameter: zero weights with zero gradients, from which all
    state but the counter of steps comes out as zero.
    """
    owned = [group["params"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["params"] = []
        for group, parameters in zip(optimizer.param_groups, owned, strict=True):
            for parameter in parameters:
                if not optimizer.state.get(parameter):
                    optimizer.state[parameter] = _twin_state(optimizer, group, parameter)
            group["params"] = []
    finally:
        for group, parameters in zip(optimizer.param_groups, owned, strict=True):
            group["params"] = parameters


def optimizer_tensors(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimiser's state as `parameter.key` -> tensor, sharded as the parameters are.

    The tensors are the state itself, not copies: filling them in place loads a checkpoint. A state
    in 8 bits has two: `parameter.key.codes` and `parameter.key.scale`.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            assert isinstance(value, Tensor), f"{name}.{key} is no tensor"  # true of all kinds
            if hasattr(value, "codes"):
                tensors |= {f"{name}.{key}.{part}": getattr(value, part) for part in _PARTS}
            else:
                tensors[f"{name}.{key}"] = value.detach()
    return tensors


class _Together(Optimizer):
    """Several optimisers as one: it has their groups, and they share its state."""

    def __init__(self, members: Sequence[Optimizer]) -> None:
        groups = [group for member in members for group in member.param_groups]
        super().__init__(groups, {})
        self.param_groups = groups  # the same dicts: what is set here is set there
        self.members = members
        for member in members:
            member.state = self.state

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] (nobody passes a closure)
        for member in self.members:
            member.step()


def _groups(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups of equal rate and decay; of kind muon the matrices' are apart, in the second list."""
    found: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    used: set[int] = set()
    for name, parameter in parameters.items():
        scale, decay = 1.0, config.weight_decay
        index = next((i for i, g in enumerate(config.groups) if _matches(g.match, name)), None)
        if index is not None:
            used.add(index)
            group = config.groups[index]
            scale = group.lr_scale
            decay = decay if group.weight_decay is None else group.weight_decay
        if parameter.ndim < 2:
            decay = 0.0
        is_matrix = config.kind == "muon" and parameter.ndim == 2 and not _TABLE.search(name)
        found.setdefault((is_matrix, scale, decay), []).append(parameter)
    for index, group in enumerate(config.groups):
        if index not in used:
            taken = any(_matches(group.match, name) for name in parameters)
            why = "an earlier group has all that match it" if taken else "no name matches it"
            raise ValueError(
                f"optimizer.groups[{index}].match {group.match!r} has no parameter: {why}; the "
                f"names are such as {next(iter(parameters))}; correct it or remove the group"
            )
    groups: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for (is_matrix, scale, decay), members in found.items():
        settings = {"params": members, "lr_scale": scale, "weight_decay": decay}
        groups[is_matrix].append(settings)
    return groups


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise ValueError(
            f"optimizer.groups: match {pattern!r} is no regular expression: {error}; escape its "
            "special characters with a backslash"
        ) from error


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _adamw8bit(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    try:
        torchao = import_module("torchao.optim")
    except ImportError as error:
        raise ValueError(
            "optimizer.kind adamw8bit needs torchao, which is not installed; run pip install "
            "'latentdiff[8bit]', or set optimizer.kind=adamw"
        ) from error
    return torchao.AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def _step_fused(
    optimizer: torch.optim.AdamW, excess: Tensor | None, skip: Tensor | None, device: torch.device
) -> None:
    """The kernel itself divides gradients and looks whether to do nothing (GradScaler's way)."""
    # torch declares neither attribute; .to waits, if at all, for weights kept on the host
    scale = None if excess is None else excess.to(device)
    found = None if skip is None else skip.to(device)
    vars(optimizer).update(grad_scale=scale, found_inf=found)
    optimizer.step()
    vars(optimizer).update(grad_scale=None, found_inf=None)


def _twin_state(
    optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter
) -> dict[str, Any]:
    """State that one step makes for zeros of a parameter's shape, its counter back at 0."""
    twin = nn.Parameter(torch.zeros_like(parameter))
    twin.grad = torch.zeros_like(parameter)
    group["params"] = [twin]
    optimizer.step()
    state = dict(optimizer.state.pop(twin))
    if "step" in state:
        state["step"].zero_()
    return state
