"""Are the autoencoder's losses the ones in the papers, and can each be switched off?"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as reference_kl

from vae.autoencoder import Autoencoder
from vae.config import KLConfig, ObjectiveConfig
from vae.discriminator import PatchDiscriminator, discriminator_loss, generator_loss
from vae.objective import Objective, Reconstruction, kl_divergence, reconstruct


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_pass() -> Reconstruction:
    image, output = random(2, 3, 16, 16).tanh(), random(2, 3, 16, 16, seed=1).tanh()
    return Reconstruction(image, output, random(2, 4, 4, 4), random(2, 4, 4, 4, seed=2))


def objective(**terms: Any) -> Objective:
    torch.manual_seed(0)
    return Objective(ObjectiveConfig.model_validate(terms))


# KL


def test_kl_is_that_of_torch_distributions() -> None:
    mean, logvar = random(2, 4, 3, 5), random(2, 4, 3, 5, seed=1)
    expected = reference_kl(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)


def test_kl_is_zero_at_the_prior_and_positive_elsewhere() -> None:
    zero = torch.zeros(1, 4, 2, 2)
    assert kl_divergence(zero, zero) == 0
    for mean, logvar in ((0.1, 0.0), (0.0, 0.1), (0.0, -0.1), (-2.0, 3.0)):
        assert kl_divergence(zero + mean, zero + logvar) > 0


# Terms

TERMS: dict[str, dict[str, Any]] = {
    "l1": {"reconstruction": {"l1": 2.0, "l2": 0.0}, "kl": None},
    "l2": {"reconstruction": {"l1": 0.0, "l2": 3.0}, "kl": None},
    "l1 kl": {"reconstruction": {"l1": 1.0}, "kl": {"weight": 0.5}},
    "l1 l2 kl adversarial": {
        "reconstruction": {"l1": 1.0, "l2": 1.0},
        "adversarial": {"channels": 8},
    },
}


@pytest.mark.parametrize("names", TERMS)
def test_each_term_can_be_switched(names: str) -> None:
    terms = objective(**TERMS[names])(one_pass(), step=0)
    assert set(terms) == {*names.split(), "loss"}
    torch.testing.assert_close(terms["loss"], sum(terms[name] for name in names.split()))
    assert all(value.shape == () for value in terms.values())


def test_terms_are_what_they_say_times_their_weight() -> None:
    r = one_pass()
    terms = objective(
        reconstruction={"l1": 2.0, "l2": 3.0},
        kl={"weight": 0.5},
        adversarial={"weight": 0.25, "channels": 8},
    )
    values = terms(r, step=0)
    assert terms.discriminator is not None
    torch.testing.assert_close(values["l1"], 2 * (r.output - r.image).abs().mean())
    torch.testing.assert_close(values["l2"], 3 * (r.output - r.image).square().mean())
    torch.testing.assert_close(values["kl"], 0.5 * kl_divergence(r.mean, r.logvar))
    torch.testing.assert_close(values["adversarial"], -0.25 * terms.discriminator(r.output).mean())


def test_a_perfect_reconstruction_costs_nothing() -> None:
    r = one_pass()
    perfect = Reconstruction(r.image, r.image, 0 * r.mean, 0 * r.logvar)
    assert objective(reconstruction={"l1": 1, "l2": 1}, kl={"weight": 1})(perfect, 0)["loss"] == 0


def test_the_adversarial_term_starts_at_its_step() -> None:
    late = objective(adversarial={"start_step": 10, "channels": 8})
    assert "adversarial" not in late(one_pass(), step=9)
    assert "adversarial" in late(one_pass(), step=10)
    assert late.adversarial_at(9) is None and late.adversarial_at(10) is not None


def test_an_objective_must_look_at_the_picture() -> None:
    with pytest.raises(ValueError, match=r"no term compares the output with the picture; got"):
        ObjectiveConfig.model_validate({"reconstruction": {"l1": 0, "l2": 0}})
    ObjectiveConfig.model_validate({"reconstruction": {"l1": 0}, "perceptual": {}})


def test_what_the_loss_sees_is_float32() -> None:
    autoencoder = Autoencoder.build(
        KLConfig(
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            mid_block_attention=False,
        )
    )
    terms = objective(adversarial={"channels": 8})
    image = random(2, 3, 8, 8).tanh()
    with torch.autocast("cpu", torch.bfloat16):
        r = reconstruct(autoencoder.model, image, random(2, 4, 4, 4))
        values = terms(r, step=0)
    assert {r.output.dtype, r.mean.dtype, r.logvar.dtype} == {torch.float32}
    assert {value.dtype for value in values.values()} == {torch.float32}


@torch.no_grad()
def test_reconstruct_draws_from_the_posterior() -> None:
    autoencoder = Autoencoder.build(
        KLConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    ).eval()
    image, noise = random(1, 3, 8, 8).tanh(), random(1, 4, 4, 4)
    r = reconstruct(autoencoder.model, image, noise)
    posterior = autoencoder.model.encode(image).latent_dist
    z = posterior.mean + posterior.std * noise
    torch.testing.assert_close(r.output, autoencoder.model.decode(z).sample)
    assert r.image is image and torch.equal(r.mean, posterior.mean)


# The discriminator


def test_hinge_losses() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    # (relu(1 - D(real)) + relu(1 + D(fake))) / 2 and -D(fake)
    assert discriminator_loss(real, fake).item() == pytest.approx(
        ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3) / 2
    )
    assert generator_loss(fake).item() == pytest.approx(2 / 3)


def test_hinge_losses_pull_the_right_way() -> None:
    real, fake = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    discriminator_loss(real, fake).backward()
    assert real.grad is not None and fake.grad is not None
    assert (real.grad < 0).all() and (fake.grad > 0).all()  # descent: real up, fake down
    fake.grad = None
    generator_loss(fake).backward()
    assert fake.grad is not None and (fake.grad < 0).all()  # descent: fake up
    far = torch.full((3,), 1.5)
    assert discriminator_loss(far, -far) == 0  # beyond the margin nothing pulls


@pytest.mark.parametrize(("channels", "layers"), [(8, 1), (32, 2), (6, 3)])
def test_one_logit_a_patch(channels: int, layers: int) -> None:
    network = PatchDiscriminator(channels, layers)
    logits = network(random(2, 3, 32, 16))
    assert logits.shape == (2, 1, 32 // 2**layers, 16 // 2**layers)


def test_a_discriminator_learns_to_tell() -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(8, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    smooth, rough = random(8, 3, 1, 1).expand(8, 3, 16, 16), random(8, 3, 16, 16, seed=1)
    for _ in range(30):
        optimizer.zero_grad()
        discriminator_loss(network(smooth), network(rough)).backward()
        optimizer.step()
    assert discriminator_loss(network(smooth), network(rough)) < 0.3  # 1 where it knows nothing
    assert network(smooth).mean() > network(rough).mean()


# The perceptual term


def test_the_perceptual_term_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(
        ValueError, match=r"needs the package lpips; install lpips .* objective.perceptual=null"
    ):
        objective(perceptual={})


def test_the_perceptual_term_with_and_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distance(torch.nn.Module):
        """What `lpips.LPIPS` is to the objective: pictures -> [b, 1, 1, 1]."""

        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.weight * (a - b).square().mean((1, 2, 3), keepdim=True)

    package: Any = ModuleType("lpips")
    package.LPIPS = Distance
    monkeypatch.setitem(sys.modules, "lpips", package)
    with pytest.raises(ValueError, match=r"weights_path /no/vgg is not a file; install lpips"):
        objective(perceptual={"weights_path": "/no/vgg"})
    terms = objective(perceptual={"weight": 0.5})
    r = one_pass()
    expected = 0.5 * (r.output - r.image).square().mean()
    torch.testing.assert_close(terms(r, 0)["perceptual"], expected)
    assert not any(p.requires_grad for p in terms.parameters())  # a frozen judge

    def offline(**_: Any) -> Any:
        raise OSError("no route to host")

    package.LPIPS = offline
    with pytest.raises(ValueError, match=r"could not be fetched \(no route to host\); install"):
        objective(perceptual={})
