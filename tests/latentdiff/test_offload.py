"""Are weights where they must be, when they must be, and the numbers the same?"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentdiff.offload import BlockStage, Stage


class Net(nn.Module):
    """Blocks in a row, with a buffer, a weight used twice, and a channels-last kernel."""

    scale: Tensor

    def __init__(self, num_blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 8, 3, padding=1).to(memory_format=torch.channels_last)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(num_blocks))
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


# A whole network


def test_on_a_cpu_a_stage_does_nothing(x: Tensor) -> None:
    net = Net()
    before = dict(net.named_parameters())
    stage = Stage(net, "cpu")
    with stage as ready:
        assert ready is net
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


# Block by block


@pytest.mark.parametrize("num_blocks", [2, 3, 4])
def test_blocks_in_turn_give_the_same_numbers_bitwise(num_blocks: int, x: Tensor) -> None:
    net = Net(num_blocks)
    expected, before = net(x), copies(net)
    stage = BlockStage(net, "cpu", list(net.blocks))
    for _ in range(2):  # a stage is entered again for the next batch
        with stage as ready, torch.inference_mode():
            for _ in range(3):  # steps
                assert torch.equal(ready(x), expected)
    for name, tensor in copies(net).items():
        assert torch.equal(tensor, before[name])
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in net.blocks)


def test_two_slots_are_all_that_the_blocks_have_on_the_device(x: Tensor) -> None:
    net = Net(5)
    addresses: list[int] = []
    stage = BlockStage(net, "cpu", list(net.blocks))
    host = {p.data_ptr() for p in net.blocks.parameters()}

    def note(block: Any, *_: object) -> None:
        addresses.append(block.weight.data_ptr())

    with stage:
        for block in net.blocks:
            block.register_forward_pre_hook(note)
        net(x)
        net(x)
    assert len(addresses) == 10
    assert len(set(addresses)) == 2
    assert host.isdisjoint(addresses)
    # a block that computes and the one that comes next never have the same slot
    assert all(this != other for this, other in pairwise(addresses))
    block = sum(-(-t.numel() * 4 // 256) * 256 for t in net.blocks[0].parameters())
    rest = Stage(net, "meta").num_bytes - 5 * block
    assert stage.num_bytes == rest + 2 * block


def test_the_next_block_is_there_before_it_is_asked_for(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net(3)
    stage = BlockStage(net, "cpu", list(net.blocks))
    sent: list[tuple[int, int]] = []
    send = stage._send

    def noted(number: int, slot: int) -> None:
        sent.append((number, slot))
        send(number, slot)

    monkeypatch.setattr(stage, "_send", noted)
    with stage:
        net(x)
        net(x)
    assert [number for number, _ in sent] == [0, 1, 2, 0, 1, 2, 0]  # each once, none twice
    assert [slot for _, slot in sent] == [0, 1, 0, 1, 0, 1, 0]


def test_blocks_out_of_turn_are_right_too(x: Tensor) -> None:
    net = Net(4)
    feature = torch.randn(2, 8, 8, 8)
    blocks: Any = net.blocks
    expected = [block(feature) for block in blocks]
    with BlockStage(net, "cpu", list(net.blocks)):
        for number in (2, 2, 0, 3, 3, 1, 0):
            assert torch.equal(blocks[number](feature), expected[number])


def test_a_block_that_fails_leaves_the_host_s_weights(x: Tensor) -> None:
    net = Net(3)
    expected, before = net(x), copies(net)
    stage = BlockStage(net, "cpu", list(net.blocks))
    with pytest.raises(RuntimeError, match="expected input"), stage:
        net.blocks[0](x)  # 4 channels instead of 8
    for name, tensor in copies(net).items():
        assert torch.equal(tensor, before[name])
    with stage:
        assert torch.equal(net(x), expected)


def test_what_cannot_be_moved_block_by_block() -> None:
    net = Net(1)
    with pytest.raises(
        ValueError, match=r"got 1 block\(s\) of Net .* expected two or more; use St"
    ):
        BlockStage(net, "cpu", list(net.blocks))
    with pytest.raises(
        ValueError, match=r"two blocks hold the same weights; .* leave out the inner"
    ):
        BlockStage(net, "cpu", [net.last, net.tied])
    with pytest.raises(ValueError, match="two blocks hold the same weights"):
        BlockStage(net, "cpu", [net.blocks, net.blocks[0]])
