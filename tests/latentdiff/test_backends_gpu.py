"""Do CUDA graphs give the U-Net's numbers, without waiting and within their memory?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.backends.compiled import compiled
from latentdiff.backends.graphs import Graphs

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


class Network(nn.Module):
    """A convolution that the time biases and the text scales."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, noisy: Tensor, time: Tensor, text: Tensor) -> Tensor:
        rows = text.shape[0] // noisy.shape[0]
        h = F.silu(self.conv(noisy) + time[:, :, None, None]).repeat(rows, 1, 1, 1)
        return h * text.mean((1, 2))[:, None, None, None]


def network(dtype: torch.dtype = torch.float32) -> Network:
    torch.manual_seed(0)
    return Network().requires_grad_(False).to("cuda", dtype)


def inputs(b: int, rows: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = ((b, 4, 16, 16), (1, 4), (rows, 7, 5))
    made = [torch.randn(s, generator=generator, device="cuda", dtype=dtype) for s in shapes]
    return made[0].contiguous(memory_format=torch.channels_last), made[1], made[2]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Switched on by hand: any synchronisation of host and device raises."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_graph_gives_the_networks_numbers(dtype: torch.dtype) -> None:
    eager = network(dtype)
    run = Graphs(eager)
    for seed, (b, rows) in enumerate([(1, 2), (8, 16), (1, 2), (3, 3), (1, 2)]):
        given = inputs(b, rows, seed, dtype)
        with torch.inference_mode():
            expected = eager(*given)
        got = run(*given)
        error = (got - expected).float().norm() / expected.float().norm()
        assert error.item() < TOLERANCE[dtype]
    assert len(run._recorded) == 3


def test_a_result_is_the_callers() -> None:
    run = Graphs(network())
    first = run(*inputs(1, 2, 0))
    kept = first.clone()
    run(*inputs(1, 2, 1))
    assert torch.equal(first, kept)


def test_the_inputs_are_read_at_each_call() -> None:
    run = Graphs(network())
    noisy, time, text = inputs(1, 2, 0)
    once = run(noisy, time, text)
    for changed in ((2 * noisy, time, text), (noisy, 2 * time, text), (noisy, time, 2 * text)):
        assert not torch.equal(run(*changed), once)


def test_a_replay_waits_for_nothing(no_waiting: None) -> None:
    run = Graphs(network())
    given = inputs(2, 4, 0)
    run(*given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(5):
        run(*given)


def test_the_least_recently_used_graph_goes_first() -> None:
    run = Graphs(network(), max_bytes=0)
    for b in (1, 2, 3):
        run(*inputs(b, b, 0))
        assert len(run._recorded) == 1  # the last one stays, whatever it takes
    small = Graphs(network(), max_bytes=1 << 40)
    for b in (1, 2, 1, 3):
        small(*inputs(b, b, 0))
    used = [recorded.inputs[0].shape[0] for recorded in small._recorded.values()]
    assert used == [2, 1, 3]


def test_another_thread_may_take_memory_while_a_graph_is_recorded() -> None:
    """A decoder that works meanwhile must not spoil the recording."""
    import threading

    stop = threading.Event()

    def decode() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            size = 1
            while not stop.is_set():
                torch.empty(size << 20, device="cuda").zero_()
                size += 1 if size < 64 else -63

    thread = threading.Thread(target=decode)
    thread.start()
    try:
        for b in range(1, 5):
            Graphs(network())(*inputs(b, b, 0))
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
def test_a_compiled_network_may_be_recorded() -> None:
    eager = network()
    run = Graphs(compiled(eager, "cuda"))
    for seed in range(3):
        given = inputs(2, 4, seed)
        with torch.inference_mode():
            expected = eager(*given)
        assert ((run(*given) - expected).norm() / expected.norm()).item() < 1e-4
