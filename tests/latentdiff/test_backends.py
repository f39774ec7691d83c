"""Is half precision taken where it is right, and is what torch.compile made used again?"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentdiff.backends import precision
from latentdiff.backends.compiled import compiled, keep_compiled
from latentdiff.backends.graphs import Graphs
from latentdiff.backends.precision import (
    best_dtype,
    finite_or_again,
    operation_error,
    relative_error,
)

CACHE = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "cache"))
    precision._known_error.cache_clear()
    return tmp_path / "cache"


def pretend_cpu(monkeypatch: pytest.MonkeyPatch, error: float, **capabilities: object) -> list[int]:
    """This CPU has these capabilities and this error in bfloat16; returns what counts trials."""
    trials: list[int] = []

    def measured(dtype: torch.dtype) -> float:
        trials.append(1)
        return error

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(precision, "operation_error", measured)
    return trials


# Precision


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_bfloat16_where_the_cpu_has_it_and_it_is_right(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_cpu(monkeypatch, 0.003, **{name: True})
    assert best_dtype("cpu") == torch.bfloat16


@pytest.mark.parametrize("error", [0.1, float("nan"), float("inf")])
def test_wrong_bfloat16_is_not_taken(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cpu(monkeypatch, error, avx512_bf16=True)
    assert best_dtype("cpu") == torch.float32
    precision._known_error.cache_clear()
    assert best_dtype("cpu") == torch.float32  # remembered


def test_emulated_bfloat16_is_not_even_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = pretend_cpu(monkeypatch, 0.003, avx512_f=True, avx512_bf16=False)
    assert (best_dtype("cpu"), trials) == (torch.float32, [])


def test_the_trial_is_remembered_for_one_cpu_and_torch(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    trials = pretend_cpu(monkeypatch, 0.003, bf16=True, cpu_name="A")
    for _ in range(2):
        assert best_dtype("cpu") == torch.bfloat16
        precision._known_error.cache_clear()
    assert len(trials) == 1
    monkeypatch.setattr(torch, "__version__", "9.9")
    best_dtype("cpu")
    assert len(trials) == 2
    assert list(json.loads((own_cache / "bfloat16.json").read_text())) == ["A, torch 9.9"]
    precision._known_error.cache_clear()
    pretend_cpu(monkeypatch, 0.1, bf16=True, cpu_name="B")
    assert best_dtype("cpu") == torch.float32


@pytest.mark.parametrize("content", ["", "[]", "{", '{"A, torch 9": "x"}'])
def test_a_damaged_memory_is_measured_again(
    content: str, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    monkeypatch.setattr(torch, "__version__", "9")
    trials = pretend_cpu(monkeypatch, 0.003, bf16=True, cpu_name="A")
    own_cache.mkdir()
    (own_cache / "bfloat16.json").write_text(content)
    assert (best_dtype("cpu"), len(trials)) == (torch.bfloat16, 1)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((6, 1), torch.float32), ((7, 0), torch.float16)]
)
def test_a_gpu_takes_float16_where_that_is_fast(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert best_dtype("cuda:1") == dtype


def test_operations_are_right_here() -> None:
    assert operation_error(torch.float32) == 0
    assert 1e-4 < operation_error(torch.bfloat16) < 1e-2


def test_relative_error_is_relative() -> None:
    x = torch.tensor([3.0, 4.0])
    assert relative_error(x, x) == 0
    assert relative_error(1000 * 1.1 * x, 1000 * x) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(x, torch.zeros(2)) == 1
    assert not relative_error(x / 0, x) <= 1


# What overflows


def test_finite_latents_are_drawn_once() -> None:
    tried: list[torch.dtype] = []

    def draw(dtype: torch.dtype) -> Tensor:
        tried.append(dtype)
        return torch.ones(2)

    assert finite_or_again(draw, torch.float16).tolist() == [1, 1]
    assert tried == [torch.float16]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_overflow_is_drawn_again_in_float32_and_said(bad: float) -> None:
    def draw(dtype: torch.dtype) -> Tensor:
        return torch.tensor([1.0, 2.0 if dtype == torch.float32 else bad])

    with pytest.warns(UserWarning, match="the network overflowed in float16; drawn again"):
        z = finite_or_again(draw, torch.float16)
    assert z.tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:the network overflowed")
def test_what_float32_cannot_draw_is_an_error(dtype: torch.dtype) -> None:
    with pytest.raises(FloatingPointError, match=r"not finite, in float32 too.*lower the guidance"):
        finite_or_again(lambda dtype: torch.full((2,), torch.nan), dtype)


# CUDA graphs, where there is no GPU


def test_graphs_say_that_they_need_a_gpu() -> None:
    run = Graphs(lambda noisy, time, text: noisy)
    x = torch.zeros(1)
    with pytest.raises(ValueError, match="all inputs on one CUDA device; got cpu, cpu, cpu"):
        run(x, x, x)


# torch.compile


def test_the_cache_of_compiled_networks_is_the_users_own(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    monkeypatch.delenv(CACHE, raising=False)
    keep_compiled()
    assert os.environ[CACHE] == str(own_cache / "inductor")
    assert (own_cache / "inductor").stat().st_mode & 0o777 == 0o700


def test_torchs_own_default_is_no_choice_of_the_users(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv(CACHE, default_cache_dir())
    keep_compiled()
    assert os.environ[CACHE] == str(own_cache / "inductor")


def test_the_users_choice_of_a_cache_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "mine"))
    keep_compiled()
    assert os.environ[CACHE] == str(tmp_path / "mine")


def test_a_cache_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    monkeypatch.delenv(CACHE, raising=False)
    own_cache.write_text("a file")
    with pytest.raises(ValueError, match=r"inductor cannot be written .*set LATENTDIFF_CACHE or"):
        keep_compiled()


def test_a_missing_compiler_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"looked for g\+\+, .*install one .*--compile off"):
        compiled(nn.Linear(1, 1), "cpu")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(ValueError, match="looked for /no/such/compiler;"):
        compiled(nn.Linear(1, 1), "cpu")


PROGRAM = """
import json, time, warnings
import torch
from torch import nn
from latentdiff.backends.compiled import compiled

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, noisy, time, text):
        return torch.tanh(self.linear(noisy) + time) * text

torch.manual_seed(0)
network = Tiny().requires_grad_(False)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    run = compiled(network, "cpu")
with torch.inference_mode():
    x = torch.ones(2, 4)
    start = time.perf_counter()
    got = run(x, x, x)
    took = time.perf_counter() - start
    torch.testing.assert_close(got, network(x, x, x))
from torch._dynamo.utils import counters
print(json.dumps([took, counters["inductor"]["fxgraph_cache_hit"], str(said[0].message)]))
"""


@pytest.mark.slow
def test_the_next_process_compiles_nothing(run_python: Any, own_cache: Path) -> None:
    def run() -> list[Any]:
        done = run_python("-c", PROGRAM, LATENTDIFF_CACHE=str(own_cache), **{CACHE: ""})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    (first, hits, said), (second, hits_again, _) = run(), run()
    assert (hits, hits_again) == (0, 1)
    assert second < first
    assert "takes about a minute for each new size" in said
