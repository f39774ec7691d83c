"""Do all attention back-ends compute the same thing, and does each say why it cannot run?"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff import attention, attention_kernels, attention_trials
from latentdiff.attention import NAMES, Choice, choose, report
from latentdiff.attention_kernels import BACKENDS, bind, sliced
from latentdiff.attention_trials import Shape, Trial, attempt, shapes_of, widths_to_try

CPU = torch.device("cpu")
ON_CPU = ("sdpa", "flash", "math", "sliced")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "cache"))
    attention_trials.measured.cache_clear()
    attention_kernels.xformers_problem.cache_clear()
    yield
    attention_trials.measured.cache_clear()
    attention_kernels.xformers_problem.cache_clear()


def fused(tokens: int, count: int, heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """`count` views of one projection's output, none of them contiguous."""
    joined = torch.randn(2, tokens, count, heads, head_dim).to(dtype)
    return list(joined.permute(2, 0, 3, 1, 4).unbind())


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v


SHAPES = [(64, 64, 8, 40), (16, 77, 3, 80), (9, 77, 2, 160), (100, 100, 1, 64), (1, 1, 5, 8)]
SHAPES += [(33, 1, 2, 7), (1, 300, 2, 12)]  # one key; one query; head dims that no kernel is for


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ON_CPU)
def test_same_as_the_formula_in_float64(name: str, shape: tuple[int, int, int, int]) -> None:
    queries, keys, heads, head_dim = shape
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)):
        if queries == keys:
            q, k, v = fused(queries, 3, heads, head_dim, dtype)
        else:
            (q,), (k, v) = (
                fused(queries, 1, heads, head_dim, dtype),
                fused(keys, 2, heads, head_dim, dtype),
            )
        expected = exact(q, k, v)
        got = bind(name, CPU)(q, k, v)
        assert got.shape == q.shape and got.dtype == dtype
        assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", ON_CPU)
def test_padding_the_head_dim_changes_nothing(name: str) -> None:
    q, k, v = fused(24, 3, 4, 40, torch.float32)
    got = bind(name, CPU, padded_to=64)(q, k, v)
    assert got.shape == q.shape
    torch.testing.assert_close(got, exact(q, k, v).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("max_bytes", [1, 77 * 4, 5 * 77 * 4, 50 * 77 * 4, 150 * 77 * 4, 1 << 30])
def test_slices_of_any_size_are_exact(max_bytes: int) -> None:
    (q,), (k, v) = fused(50, 1, 7, 40, torch.float32), fused(77, 2, 7, 40, torch.float32)
    got = sliced(q, k, v, 40**-0.5, max_bytes=max_bytes)
    torch.testing.assert_close(got, exact(q, k, v).float(), atol=1e-5, rtol=1e-5)


def test_a_slices_scores_stay_below_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    softmax = torch.softmax

    def watched(scores: Tensor, dim: int) -> Tensor:
        sizes.append(scores.numel() * scores.element_size())
        return softmax(scores, dim=dim)

    monkeypatch.setattr(torch, "softmax", watched)
    q, k, v = fused(128, 3, 8, 40, torch.bfloat16)
    for budget in (128 * 4, 20_000, 128 * 128 * 4, 300_000):
        sizes.clear()
        sliced(q, k, v, 40**-0.5, max_bytes=budget)
        assert max(sizes) <= budget < 2 * max(sizes) + 128 * 4 * 64, "as large as the budget allows"
        assert sum(sizes) == 2 * 8 * 128 * 128 * 4, "each score once"


def test_half_precision_survives_large_scores() -> None:
    q = torch.full((1, 1, 2, 64), 300.0, dtype=torch.float16)  # q k = 5.8e6: infinite in float16
    v = torch.arange(128.0, dtype=torch.float16).view(1, 1, 2, 64)
    got = bind("sliced", CPU)(q, q, v)
    torch.testing.assert_close(got, v.mean(dim=2, keepdim=True).expand_as(v), rtol=1e-3, atol=0)


def test_the_result_joins_its_heads_without_a_copy() -> None:
    q, k, v = fused(24, 3, 4, 40, torch.float32)
    for name in ("sdpa", "flash", "sliced"):
        got = bind(name, CPU)(q, k, v).transpose(1, 2)
        assert got.is_contiguous(), name


def test_auto_on_a_cpu_is_torchs_choice_and_measures_nothing() -> None:
    choice = choose("auto", "cpu", torch.float32, (40, 80, 160), 1024)
    assert choice.name == "sdpa" and choice.attend is F.scaled_dot_product_attention
    assert choice.timings_ms == {} and "auto measures on CUDA only" in choice.reason


@pytest.mark.parametrize("name", ON_CPU)
def test_a_named_one_is_taken(name: str) -> None:
    choice = choose(name, CPU, torch.bfloat16, (40, 80), 64)
    assert choice.name == name and choice.reason == "asked for"
    q, k, v = fused(16, 3, 2, 40, torch.bfloat16)
    assert choice.attend(q, k, v).shape == q.shape


def test_a_model_without_attention_has_nothing_to_choose() -> None:
    assert choose("flash", CPU, torch.float32, (), 0).reason == "the model has no attention"


def test_unknown_name() -> None:
    with pytest.raises(
        ValueError, match="attention 'flashy' is unknown; use one of auto, sdpa, fl"
    ):
        choose("flashy", CPU, torch.float32, (40,), 64)
    assert list(NAMES) == ["auto", *BACKENDS]


@pytest.mark.parametrize("name", ["cudnn", "efficient", "xformers"])
def test_what_cannot_run_here_says_why_and_what_can(name: str) -> None:
    with pytest.raises(ValueError) as told:
        choose(name, CPU, torch.float32, (40,), 64)
    text = str(told.value)
    assert text.startswith(f"attention '{name}' cannot run on cpu with float32 and head_dim 40: ")
    assert "for CUDA, not for cpu" in text
    assert text.endswith("What can run here: sdpa, flash, math, sliced; auto takes the fastest")


def test_a_back_end_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention_kernels._KERNELS, "math", lambda q, k, v, scale: v * 1.1)
    trial = attempt("math", CPU, torch.float32, [Shape(8, 4, 4)])
    assert trial.problem is not None and "its result is wrong here: " in trial.problem
    monkeypatch.setitem(attention_kernels._KERNELS, "math", lambda q, k, v, scale: v * torch.nan)
    assert attempt("math", CPU, torch.float32, [Shape(8, 4, 4)]).problem is not None


def test_a_back_end_that_raises_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("no kernel\n   for this")

    monkeypatch.setitem(attention_kernels._KERNELS, "math", broken)
    assert attempt("math", CPU, torch.float32, [Shape(8, 4, 4)]).problem == "no kernel for this"

    def hungry(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(attention_kernels._KERNELS, "math", hungry)
    trial = attempt("math", CPU, torch.float32, [Shape(8, 4096, 4)])
    assert trial.problem == "out of memory at 4096 tokens"


def test_torchs_reasons_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = fused(8, 3, 2, 40, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left to see
        told = attention_kernels.torchs_words("flash", q, k, v[..., :8])
    assert told == (
        "Flash attention requires q,k,v to have the same last dimension. Got Query.size(-1): 40, "
        "Key.size(-1): 40, Value.size(-1): 8 instead"
    )

    def talks(*_: Tensor) -> None:  # as on CUDA, where all kernels are gone through
        for line in (
            "Memory efficient kernel not used because: (Triggered internally at x.cpp:1.)",
            "Memory Efficient attention has been runtime disabled. (Triggered internally)",
            "CuDNN attention kernel not used because: (Triggered internally at x.cpp:3.)",
            "Expected half precision. (Triggered internally)",
            "Expected contiguous. (Triggered internally)",
            "Flash attention kernel not used because: (Triggered internally at x.cpp:2.)",
            "Flash attention has been runtime disabled. (Triggered internally)",
        ):
            warnings.warn(line, stacklevel=1)
        raise RuntimeError("No available kernel.  Aborting execution.")

    monkeypatch.setattr(F, "scaled_dot_product_attention", talks)
    told = attention_kernels.torchs_words("cudnn", q, k, v)
    assert told == "Expected half precision; Expected contiguous"


def test_the_report_covers_every_back_end() -> None:
    trials = {trial.name: trial for trial in report(CPU, torch.float32, (40, 80), 64)}
    assert tuple(trials) == BACKENDS
    for name in BACKENDS:
        trial = trials[name]
        if name in ON_CPU:
            assert trial.problem is None and trial.ms is not None and trial.ms > 0
            assert trial.difference is not None and 0 < trial.difference < 1e-5
        else:
            assert trial.problem is not None and trial.ms is None and trial.difference is None


def test_shapes_of_a_u_net() -> None:
    assert shapes_of((40, 80), 1024) == [
        Shape(40, 1024, 1024),
        Shape(40, 1024, 77),
        Shape(80, 256, 256),
        Shape(80, 256, 77),
    ]
    assert shapes_of((8, 8, 8), 1)[-1] == Shape(8, 1, 77)


def test_widths_that_are_tried() -> None:
    cuda = torch.device("cuda")
    assert widths_to_try("flash", cuda, 40) == [None, 64]
    assert widths_to_try("cudnn", cuda, 80) == [None, 96, 128]
    assert widths_to_try("efficient", cuda, 160) == [None, 192, 256]
    assert widths_to_try("flash", cuda, 64) == [None]
    assert widths_to_try("flash", cuda, 512) == [None]
    assert widths_to_try("sliced", cuda, 40) == widths_to_try("flash", CPU, 40) == [None]


# What `auto` does with measurements: made up here, made on a GPU in test_attention_gpu.py.


def trials_of(**ms: float) -> list[Trial]:
    return [
        Trial(name.split("_")[0], int(name.split("_")[1]) if "_" in name else None, value, 0.0)
        for name, value in ms.items()
    ]


def test_the_fastest_wins_and_a_tie_goes_to_the_first() -> None:
    assert attention._best(trials_of(sdpa=1.0, flash=0.98, math=2.0)).name == "sdpa"
    assert attention._best(trials_of(sdpa=1.0, flash=0.90, flash_64=0.5)).padded_to == 64


def test_each_head_dim_has_its_own_winner() -> None:
    trials = {
        40: trials_of(sdpa=1.0, flash=2.0, flash_64=0.5),
        80: trials_of(sdpa=3.0, sliced=1.0, flash=2.5),
    }
    choice = attention._fastest("auto", CPU, trials)
    assert choice.name == "flash+sliced"
    assert choice.timings_ms == {"sdpa": 4.0, "flash": 4.5}, "only what ran at every head dim"
    assert choice.reason == (
        "measured: flash padded to 64 at head_dim 40 (0.5 ms), sliced at head_dim 80 (1 ms)"
    )
    for head_dim in (40, 80, 24):  # 24 was not tried
        q, k, v = fused(16, 3, 2, head_dim, torch.float32)
        torch.testing.assert_close(
            choice.attend(q, k, v), exact(q, k, v).float(), atol=1e-5, rtol=1e-5
        )


def test_one_winner_for_all_is_called_directly() -> None:
    trials = {40: trials_of(sdpa=1.0, flash=2.0), 80: trials_of(sdpa=1.0, flash=2.0)}
    assert attention._fastest("auto", CPU, trials).attend is F.scaled_dot_product_attention


def measure(names: tuple[str, ...] = ("sdpa", "math")) -> dict[int, list[Trial]]:
    return attention_trials.measured(CPU, torch.float32, (8, 16), 16, names)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    attempt = attention_trials.attempt

    def counting(name: str, *rest: object) -> Trial:
        calls.append(name)
        return attempt(name, *rest)  # pyright: ignore[reportArgumentType]  # passed through

    monkeypatch.setattr(attention_trials, "attempt", counting)
    return calls


def test_measurements_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    first = measure()
    assert list(first) == [8, 16] and calls == ["sdpa", "math"] * 2
    assert measure() is first, "within the process"
    attention_trials.measured.cache_clear()
    assert measure() == first and len(calls) == 4, "and in the next one, from the file"
    stored = json.loads((tmp_path / "cache" / "attention.json").read_text())
    assert len(stored) == 1 and f"torch {torch.__version__}" in next(iter(stored))
    measure(("sdpa", "sliced"))
    assert len(calls) == 8, "another question is measured"
    assert len(json.loads((tmp_path / "cache" / "attention.json").read_text())) == 2


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"KEY": 3}', '{"KEY": {"8": [["rm", null, 1, 1]]}}']
)
def test_a_damaged_memory_is_measured_anew(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure()
    path = tmp_path / "cache" / "attention.json"
    key = next(iter(json.loads(path.read_text())))
    path.write_text(damage.replace('"KEY"', json.dumps(key)))
    attention_trials.measured.cache_clear()
    calls = counted(monkeypatch)
    again = measure()
    assert len(calls) == 4
    assert [t.name for t in again[8]] == [t.name for t in first[8]]
    assert key in json.loads(path.read_text()), "and written anew"


def test_without_a_place_to_remember_it_still_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LATENTDIFF_CACHE", str(blocked / "below"))
    assert set(measure()) == {8, 16}
    assert blocked.read_text() == ""


# xformers: not installed here, so a module stands in for it.


@pytest.fixture
def fake_xformers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    def install(attend: Callable[..., Tensor], problem: Exception | None = None) -> ModuleType:
        package, ops, library = (
            ModuleType(name) for name in ("xformers", "xformers.ops", "xformers._cpp_lib")
        )
        package.__path__ = []
        package.__spec__ = ModuleType("spec")  # pyright: ignore[reportAttributeAccessIssue]
        ops.memory_efficient_attention = attend  # pyright: ignore[reportAttributeAccessIssue]
        library._cpp_library_load_exception = problem  # pyright: ignore[reportAttributeAccessIssue]
        for module in (package, ops, library):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return package

    return install


def theirs(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[b, n, heads, d] in and out, as xformers has it."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


def test_xformers_layout_and_scale(fake_xformers: Callable[..., ModuleType]) -> None:
    fake_xformers(theirs)
    (q,), (k, v) = fused(10, 1, 3, 40, torch.float32), fused(77, 2, 3, 40, torch.float32)
    for width in (None, 64):
        got = bind("xformers", CPU, width)(q, k, v)
        torch.testing.assert_close(got, exact(q, k, v).float(), atol=1e-5, rtol=1e-5)


def test_xformers_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "find_spec", lambda name: None)
    told = "xformers is not installed; pip install xformers"
    assert attention_kernels.xformers_problem() == told


def test_xformers_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("libtorch.so:\n undefined symbol")

    monkeypatch.setattr(attention_kernels, "find_spec", lambda name: object())
    monkeypatch.setattr(attention_kernels, "_import_xformers", broken)
    assert attention_kernels.xformers_problem() == (
        "xformers does not load (libtorch.so: undefined symbol); install the xformers that was "
        f"built for torch {torch.__version__}, or none"
    )


def test_xformers_without_its_compiled_part(
    fake_xformers: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> Tensor:
        raise NotImplementedError("No operator found")

    built = RuntimeError(
        "xFormers can't load C++/CUDA extensions. xFormers was built for:\n    PyTorch 2.10.0\n"
        "  Please reinstall xformers (see the README)\n  More."
    )
    fake_xformers(refuses, built)
    monkeypatch.setattr(attention_trials, "why_not", lambda *_: None)  # as on a GPU
    assert attempt("xformers", CPU, torch.float32, [Shape(40, 8, 8)]).problem == (
        "xformers' compiled part does not load: xFormers can't load C++/CUDA extensions. xFormers "
        "was built for: PyTorch 2.10.0; install the xformers that was built for torch "
        f"{torch.__version__}, or none"
    )
    fake_xformers(refuses)
    trial = attempt("xformers", CPU, torch.float32, [Shape(40, 8, 8)])
    assert trial.problem == "No operator found"


def test_choosing_imports_no_xformers(fake_xformers: Callable[..., ModuleType]) -> None:
    before = set(sys.modules)
    for name in ("auto", *ON_CPU):
        assert isinstance(choose(name, CPU, torch.float32, (8,), 16), Choice)
    assert not {n for n in set(sys.modules) - before if n.startswith("xformers")}
