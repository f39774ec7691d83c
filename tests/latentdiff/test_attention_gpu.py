"""Do the attention back-ends of a GPU agree with float64, and is the fastest one found?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff import attention_trials
from latentdiff.attention import BACKENDS, choose, report
from latentdiff.attention_kernels import bind, why_not, xformers_problem

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SD1 = (40, 80, 160)


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path))
    attention_trials.measured.cache_clear()
    yield
    attention_trials.measured.cache_clear()


def inputs(queries: int, keys: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Views of fused projections."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, keys, 2, 8, head_dim, generator=generator).to(CUDA, dtype)
    q = torch.randn(2, queries, 1, 8, head_dim, generator=generator).to(CUDA, dtype)
    return tuple(x for y in (q, text) for x in y.permute(2, 0, 3, 1, 4).unbind())


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", BACKENDS)
@torch.inference_mode()
def test_same_as_float64(name: str, dtype: torch.dtype) -> None:
    tolerance = {torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float32: 1e-3}[dtype]
    num_run = 0
    for queries, keys, head_dim in ((1024, 1024, 40), (256, 77, 80), (64, 64, 160), (50, 77, 12)):
        q, k, v = inputs(queries, keys, head_dim, dtype)
        for width in (None, 192):
            if why_not(name, q, k, v, width) is not None:
                continue
            got, expected = bind(name, CUDA, width)(q, k, v).double(), exact(q, k, v)
            assert got.shape == q.shape
            assert (got - expected).abs().max() <= tolerance * expected.abs().max()
            num_run += 1
    runs_anywhere = name in ("sdpa", "math", "sliced")
    assert num_run > 0 or not runs_anywhere


@torch.inference_mode()
def test_operators_by_name_are_what_sdpa_kernel_chooses() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = inputs(256, 77, 80, torch.float16)
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    for name, backend in backends.items():
        if why_not(name, q, k, v) is None:
            with sdpa_kernel(backend):
                expected = F.scaled_dot_product_attention(q, k, v)
            torch.testing.assert_close(bind(name, CUDA)(q, k, v), expected, atol=1e-4, rtol=1e-3)


def test_flash_refuses_float32_in_torchs_words() -> None:
    with pytest.raises(
        ValueError, match="'flash' cannot run on cuda:0 with float32 and head_dim 40"
    ):
        choose("flash", CUDA, torch.float32, (40,), 64)


def test_auto_measures_and_remembers(tmp_path: Path) -> None:
    choice = choose("auto", CUDA, torch.float16, SD1, 4096)
    assert choice.reason.startswith("measured: ") and choice.timings_ms["sdpa"] > 0
    assert (tmp_path / "attention.json").is_file()
    attention_trials.measured.cache_clear()
    assert choose("auto", CUDA, torch.float16, SD1, 4096).timings_ms == choice.timings_ms
    for head_dim in (*SD1, 64):
        q, k, v = inputs(100, 77, head_dim, torch.float16)
        expected = exact(q, k, v)
        assert (
            choice.attend(q, k, v).double() - expected
        ).abs().max() <= 1e-2 * expected.abs().max()


def test_the_report_says_of_each_whether_it_runs() -> None:
    trials = {trial.name: trial for trial in report(CUDA, torch.float16, SD1, 1024)}
    assert tuple(trials) == BACKENDS
    assert trials["sdpa"].problem is None and trials["math"].problem is None
    for trial in trials.values():
        assert (trial.ms is None) == (trial.problem is not None)
    if (problem := xformers_problem()) is not None:
        assert trials["xformers"].problem == problem


@torch.inference_mode()
def test_attention_is_captured_into_a_graph() -> None:
    attend = choose("auto", CUDA, torch.float16, SD1, 1024).attend
    q, k, v = inputs(256, 77, 80, torch.float16)
    attend(q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v)
    q.copy_(q.flip(2))
    graph.replay()
    torch.testing.assert_close(out, attend(q, k, v), atol=1e-3, rtol=1e-2)


@torch.inference_mode()
def test_sliced_needs_less_memory_than_all_scores() -> None:
    q, k, v = inputs(4096, 4096, 40, torch.float16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    bind("sliced", CUDA)(q, k, v)
    used = torch.cuda.max_memory_allocated() - before
    assert used < 2 * 8 * 4096 * 4096 * 4 / 2, "half of the float32 scores of all heads"
