"""Are FID, KID and CLIP score of a run the libraries' own, of the right pictures, and safe?"""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from looking import ONE, broken_tar, looking_run, make_clip, make_parts, trainee
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.config import DiffusionRun
from latentdiff.features import FeatureNetwork, load_clip, load_features
from latentdiff.training.evaluation import (
    Evaluation,
    evaluate,
    frechet_distance,
    kernel_distance,
    prepare_evaluation,
)
from latentdiff.training.heldout import open_held_out
from latentdiff.training.sampling import draw_chunks
from latentdiff.training.trainee import Trainee

CPU = ONE.device


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    make_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def found(assets: Path, parts: Path) -> Trainee:
    return trainee(run(assets, parts))


def run(assets: Path, parts: Path, shards: Path | None = None, **changes: Any) -> DiffusionRun:
    clip = str(parts / "clip")
    evaluation: dict[str, Any] = {
        "data": {"shards": [str(shards or assets / "val-000000.tar")], "size_px": 32},
        "metrics": ["kid", "clip_score"],
        "num_images": 6,
        "batch_size": 4,
        "features": clip,
        "clip": clip,
    }
    evaluation["data"] |= changes.pop("data", {})
    return looking_run(assets, parts, evaluation={**evaluation, **changes})


def features(images: list[np.ndarray], parts: Path) -> Tensor:
    network = load_features(str(parts / "clip"), CPU)
    return network(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))


def gaussian(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) + shift


# The distances


def test_fid_is_that_of_the_moments() -> None:
    real, drawn = gaussian(500, 0), 2 * gaussian(400, 1, 0.3)
    means = real.double().mean(0) - drawn.double().mean(0)
    a, b = torch.cov(real.double().T), torch.cov(drawn.double().T)
    values, vectors = torch.linalg.eigh(a)
    root = vectors @ values.sqrt().diag() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).sqrt().sum()
    expected = means.square().sum() + a.trace() + b.trace() - 2 * cross
    assert frechet_distance(real, drawn) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(drawn, real) == pytest.approx(frechet_distance(real, drawn), rel=1e-9)


def test_kid_is_the_unbiased_estimate() -> None:
    real, drawn = gaussian(30, 0), gaussian(30, 1, 1.0)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x.double() @ y.double().T / 8 + 1) ** 3

    def others(k: Tensor) -> float:
        return ((k.sum() - k.trace()) / (30 * 29)).item()

    expected = others(kernel(real, real)) + others(kernel(drawn, drawn))
    expected -= 2 * kernel(real, drawn).mean().item()
    mean, deviation = kernel_distance(real, drawn)
    assert mean == pytest.approx(expected, rel=1e-9) and deviation == 0


def test_kid_draws_the_same_subsets_and_leaves_random_numbers_alone() -> None:
    real, drawn = gaussian(60, 0), gaussian(40, 1)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = kernel_distance(real, drawn)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    assert kernel_distance(real, drawn) == first and first[1] > 0


# In a run


def test_scores_are_of_the_held_out_pairs_and_their_captions(
    assets: Path, parts: Path, found: Trainee
) -> None:
    config = run(assets, parts)
    assert config.evaluation is not None and config.evaluation.clip is not None
    prepared = prepare_evaluation(found.model, config, ONE)
    scores = evaluate(found.model, found.network, prepared, config, ONE)

    loader = open_held_out(config.evaluation.data, "evaluation.data")
    captions = [loader.captions(n, [n])[0] for n in range(6)]
    assert prepared.captions == tuple(captions) and prepared.told == "6 held-out pairs"
    real = [
        (loader.image(n).permute(1, 2, 0).numpy() * 127.5 + 127.5).round().astype(np.uint8)
        for n in range(6)
    ]
    chunks = draw_chunks(found.model, found.network, config, captions, 4, ONE)
    drawn = [image for _, images in chunks for image in images if image is not None]
    expected, _ = kernel_distance(features(real, parts), features(drawn, parts))
    assert scores["kid"] == pytest.approx(expected, abs=1e-6)  # of features of another batch

    metric = load_clip(config.evaluation.clip, CPU)
    metric.update([torch.tensor(image).permute(2, 0, 1) for image in drawn], captions)
    assert scores["clip_score"] == pytest.approx(metric.compute().item(), rel=1e-5, abs=1e-5)
    assert set(scores) == {"kid", "kid_std", "clip_score"}
    assert evaluate(found.model, found.network, prepared, config, ONE) == scores


def test_real_pictures_are_looked_at_once(assets: Path, parts: Path, found: Trainee) -> None:
    config = run(assets, parts, metrics=["kid"])
    prepared = prepare_evaluation(found.model, config, ONE)
    assert prepared.features is not None and prepared.real is not None
    assert prepared.real.shape == (6, 8)
    seen: list[int] = []
    look = prepared.features._features

    def counted(images: Tensor) -> Tensor:
        seen.append(len(images))
        return look(images)

    prepared.features._features = counted
    for _ in range(2):
        evaluate(found.model, found.network, prepared, config, ONE)
    assert seen == [4, 2, 4, 2]  # those drawn, and no more


def test_captions_come_again_where_there_are_fewer_pairs(
    assets: Path, parts: Path, found: Trainee
) -> None:
    config = run(assets, parts, num_images=33)
    prepared = prepare_evaluation(found.model, config, ONE)
    assert len(prepared.captions) == 33 and prepared.captions[:3] == prepared.captions[30:]
    assert prepared.real is not None and len(prepared.real) == 30


def test_bad_pairs_are_named_and_others_stand_in(
    assets: Path, parts: Path, found: Trainee, tmp_path: Path
) -> None:
    whole = prepare_evaluation(found.model, run(assets, parts, num_images=7), ONE)
    tar = broken_tar(assets, tmp_path, [2])
    prepared = prepare_evaluation(found.model, run(assets, parts, tar), ONE)
    assert prepared.captions == whole.captions[:2] + whole.captions[3:]
    assert prepared.told.startswith("6 held-out pairs; 1 before the last cannot be used: ")
    assert prepared.real is not None and whole.real is not None
    torch.testing.assert_close(prepared.real, torch.cat([whole.real[:2], whole.real[3:]]))


@contextmanager
def broken(model: Any, places: set[int]) -> Iterator[None]:
    """The autoencoder overflows wherever it decodes one of some numbers of pictures at once."""
    decode = model.autoencoder.decode

    def fail(z: Tensor) -> Tensor:
        if len(z) in places:
            raise FloatingPointError("overflow")
        return decode(z)

    model.autoencoder.decode = fail
    try:
        yield
    finally:
        del model.autoencoder.decode


def test_pictures_that_are_not_finite_are_counted(
    assets: Path, parts: Path, found: Trainee
) -> None:
    config = run(assets, parts, num_images=7)
    prepared = prepare_evaluation(found.model, config, ONE)
    with broken(found.model, {1, 3}):  # of chunks of 4 and 3
        scores = evaluate(found.model, found.network, prepared, config, ONE)
    assert scores["eval_broken"] == 3
    assert math.isfinite(scores["kid"]) and math.isfinite(scores["clip_score"])
    with broken(found.model, {1, 3, 4}):
        scores = evaluate(found.model, found.network, prepared, config, ONE)
    assert scores.pop("eval_broken") == 7 and all(map(math.isnan, scores.values()))


def test_a_fid_of_few_pictures_is_warned_of(assets: Path, parts: Path, found: Trainee) -> None:
    with pytest.warns(UserWarning, match="FID of 6 drawn and 6 held-out pictures is biased"):
        prepare_evaluation(found.model, run(assets, parts, metrics=["fid"]), ONE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"payload": "latents"}}, "got evaluation.data.payload latents; give shards"),
        ({"data": {"flip": True}}, "evaluation.data.flip=true; set evaluation.data.flip: false"),
        ({"data": {"size_px": 30}}, "height must be a positive multiple of 4 px; got 30"),
        ({"features": None}, "evaluation.features is null, but fid and kid need a feature network"),
        ({"features": "/no/such"}, "evaluation.features /no/such not found; give a .safetensors"),
        ({"clip": "/no/such"}, "evaluation.clip /no/such is not a CLIP model in transformers'"),
    ],
)  # fmt: skip
def test_what_would_fail_later_is_refused_at_the_start(
    assets: Path, parts: Path, found: Trainee, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        prepare_evaluation(found.model, run(assets, parts, **changes), ONE)
    assert message in str(caught.value)


def test_clip_score_needs_no_feature_network(assets: Path, parts: Path, found: Trainee) -> None:
    config = run(assets, parts, metrics=["clip_score"], features=None)
    prepared: Evaluation = prepare_evaluation(found.model, config, ONE)
    assert prepared.features is None and prepared.real is None
    assert set(evaluate(found.model, found.network, prepared, config, ONE)) == {"clip_score"}


# Feature networks


def test_long_captions_are_cut_and_keep_their_end(parts: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    text, image = "a red apple " * 30, torch.full((3, 32, 32), 90, dtype=torch.uint8)
    metric = load_clip(str(parts / "clip"), CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.update([image], [text])
    model = CLIPModel.from_pretrained(parts / "clip").eval()
    processor: Any = CLIPProcessor.from_pretrained(parts / "clip")
    inputs = processor(
        text=[text], images=[image], return_tensors="pt", truncation=True, max_length=16
    )
    assert inputs["input_ids"][0, -1] == processor.tokenizer.eos_token_id
    with torch.no_grad():
        output = model(**inputs)
    expected = 100 * (output.text_embeds * output.image_embeds).sum().item()
    assert metric.score.item() == pytest.approx(expected, rel=1e-4)


def test_no_program_in_a_file_is_run(tmp_path: Path) -> None:
    class Program(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.float().mean((2, 3))

    class Evil:
        def __reduce__(self) -> Any:
            return (tmp_path / "opened").touch, ()

    torch.jit.script(Program()).save(tmp_path / "net.pt")
    (tmp_path / "net.safetensors").write_bytes(pickle.dumps(Evil()))
    for name, said in (
        ("net.pt", "TorchScript and pickles are programs, and nothing from a file is executed"),
        ("net.safetensors", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=said):
            load_features(str(tmp_path / name), CPU)
    folder = tmp_path / "model"  # transformers' own old format, and code beside it
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoModel": "code.Model", "AutoConfig": "code.C"}}'
    )
    (folder / "code.py").write_text(f"open({str(tmp_path / 'opened')!r}, 'w')")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="is not an image model in transformers' format"):
        load_features(str(folder), CPU)
    assert not (tmp_path / "opened").exists()


def test_weights_must_be_safetensors(parts: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(parts / "clip")
    folder = tmp_path / "clip"
    for file in (parts / "clip").iterdir():
        if file.suffix == ".json":
            folder.mkdir(exist_ok=True)
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is not a CLIP model in transformers' format with safe"):
        load_clip(str(folder), CPU)


def test_clips_image_features_are_those_it_compares_with_texts(parts: Path) -> None:
    from transformers import CLIPModel

    images = (torch.arange(2 * 3 * 32 * 32) % 251).to(torch.uint8).view(2, 3, 32, 32)
    found = load_features(str(parts / "clip"), CPU)(images)
    model: Any = CLIPModel.from_pretrained(parts / "clip").eval()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        expected = model.get_image_features((images / 255 - mean) / std).pooler_output
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_image_model_of_another_kind(tmp_path: Path) -> None:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(tmp_path)
    shapes: Any = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessor(**shapes).save_pretrained(tmp_path)
    network = load_features(str(tmp_path), CPU)
    assert network.width == 16
    assert network(torch.zeros(3, 3, 40, 40, dtype=torch.uint8)).shape == (3, 16)


@pytest.mark.slow  # 24 million weights, at 299 px
def test_inception_is_torch_fidelitys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    weights: dict[str, Tensor] = {}

    def keep(*_: Any, **__: Any) -> dict[str, Tensor]:  # in place of the download
        raise RuntimeError("no network")

    monkeypatch.setattr(fidelity, "load_state_dict_from_url", keep)
    monkeypatch.setattr(
        fidelity.FeatureExtractorInceptionV3,
        "load_state_dict",
        lambda self, state: weights.update(self.state_dict()),
    )
    monkeypatch.setattr(fidelity.torch, "load", lambda *_, **__: {})
    theirs = fidelity.FeatureExtractorInceptionV3("inception", ["2048"], "any")
    monkeypatch.undo()
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "inception.safetensors")

    ours = load_features(str(tmp_path / "inception.safetensors"), CPU)
    images = (torch.arange(2 * 3 * 64 * 64) % 251).to(torch.uint8).view(2, 3, 64, 64)
    assert ours.width == 2048
    torch.testing.assert_close(ours(images), theirs(images)[0], rtol=1e-5, atol=1e-5)

    del weights["fc.bias"]
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "inception.safetensors")
    with pytest.raises(ValueError, match="does not hold InceptionV3's weights"):
        load_features(str(tmp_path / "inception.safetensors"), CPU)


def test_the_feature_networks_width_is_found() -> None:
    network = FeatureNetwork(lambda images: images.float().mean((2, 3)))
    assert network.width == 3
