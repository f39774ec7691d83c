"""Are weights where they must be, when they must be, and the numbers the same?"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentdiff.offload import Stage


class Net(nn.Module):
    """Blocks in a row, with a buffer, a weight used twice, and a channels-last kernel."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 8, 3, padding=1).to(memory_format=torch.channels_last)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.last = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.last.weight
        self.register_buffer("scale", torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        x = self.tied(torch.tanh(self.last(x.mean((2, 3)))))
        return x * self.scale


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def devices(module: nn.Module) -> set[str]:
    return {t.device.type for t in (*module.parameters(), *module.buffers())}


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict(keep_vars=True).items()}


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_where_the_memory_is_the_hosts_a_stage_does_nothing(device: str) -> None:
    net = Net()
    before = dict(net.named_parameters())
    stage = Stage(net, device)
    with stage as ready:
        assert ready is net
        assert all(p is before[name] for name, p in net.named_parameters())
        assert devices(net) == {"cpu"}  # where it was: even MPS is not its business
    assert all(p is before[name] for name, p in net.named_parameters())
    assert stage.num_bytes == 0


@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_on_the_device_inside_and_on_the_host_outside(fails: bool) -> None:
    net = Net()
    before = copies(net)
    stage = Stage(net, "meta")
    assert devices(net) == {"cpu"}
    failure = pytest.raises(RuntimeError, match="in the middle") if fails else nullcontext()
    with failure, stage:
        assert devices(net) == {"meta"}
        with stage:
            assert devices(net) == {"meta"}
        assert devices(net) == {"meta"}
        if fails:
            raise RuntimeError("in the middle")
    assert devices(net) == {"cpu"}
    for name, tensor in copies(net).items():
        assert torch.equal(tensor, before[name])


def test_a_copy_of_the_weights_is_the_weights(x: Tensor) -> None:
    """What `place` puts in is bitwise the same, with strides and ties; `meta` cannot show that."""
    net = Net().double()
    net.last.bias.requires_grad_(False)
    expected, before = net(x.double()), copies(net)
    stage = Stage(net, "meta")
    weights: Any = stage._weights
    host = {name: t.data_ptr() for name, t in net.state_dict().items()}
    weights.place(weights.flat.clone())
    for name, tensor in net.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, before[name])
        assert tensor.stride() == before[name].stride()
        assert tensor.data_ptr() != host[name]
        assert isinstance(tensor, nn.Parameter) == (name != "scale")
    assert net.tied.weight is net.last.weight
    assert torch.equal(net(x.double()), expected)
    weights.flat.zero_()  # the copy is one of its own
    assert torch.equal(net(x.double()), expected)


def test_bytes_on_the_device_are_those_of_the_weights_once() -> None:
    net = Net().half()
    held = {id(t): t.numel() * t.element_size() for t in (*net.parameters(), *net.buffers())}
    found = Stage(net, "meta").num_bytes
    assert sum(held.values()) <= found <= sum(held.values()) + 256 * len(held)


def test_gaps_in_a_tensor_do_not_travel() -> None:
    net = nn.Linear(4, 4)
    wide = torch.randn(4, 400)
    net.weight = nn.Parameter(wide[:, ::100], requires_grad=False)
    stage = Stage(net, "meta")
    assert stage.num_bytes == 512
    assert torch.equal(net.weight, wide[:, ::100])


class Coded(Tensor):
    """Small whole numbers with a scale for all: a quantised weight, at its least."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Coded:
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]  # torch's stubs lack it
            cls, codes.shape, dtype=scale.dtype, device=codes.device
        )
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, *_: object) -> Coded:
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is torch.ops.aten.detach.default
        return cls(args[0].codes, args[0].scale)


def test_a_quantised_tensor_travels_by_its_parts() -> None:
    net = nn.Linear(4, 4, bias=False)
    codes, scale = torch.randint(-128, 128, (4, 4), dtype=torch.int8), torch.tensor(0.5)
    net.weight = nn.Parameter(Coded(codes, scale), requires_grad=False)
    stage = Stage(net, "meta")
    assert stage.num_bytes == 512
    with stage:
        inside: Any = net.weight
        assert isinstance(inside, Coded)
        assert (inside.codes.device.type, inside.scale.device.type) == ("meta", "meta")
    outside: Any = net.weight
    assert outside.codes.dtype == torch.int8
    assert torch.equal(outside.codes, codes)
    assert torch.equal(outside.scale, scale)
