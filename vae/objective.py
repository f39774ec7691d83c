"""How good is a reconstruction? The autoencoder's loss, term by term."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vae.config import AdversarialConfig, ObjectiveConfig, PerceptualConfig
from vae.discriminator import PatchDiscriminator, generator_loss


@dataclass(frozen=True)
class Reconstruction:
    """One pass through the autoencoder, raw (un-normalised) units, float32.

    Attributes:
        image: [b, 3, h, w] what went in.
        output: [b, 3, h, w] what came out.
        mean: [b, c, h', w'] posterior mean.
        logvar: [b, c, h', w'] posterior log-variance.
    """

    image: Tensor
    output: Tensor
    mean: Tensor
    logvar: Tensor


def reconstruct(model: Any, image: Tensor, noise: Tensor) -> Reconstruction:
    """Encode, draw from the posterior with the given standard-normal noise, decode.

    The networks may run in half precision; what the loss sees is float32.
    """
    posterior = model.encode(image).latent_dist
    z = posterior.mean + posterior.std * noise
    output = model.decode(z).sample
    return Reconstruction(image, output.float(), posterior.mean.float(), posterior.logvar.float())


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) per latent element (Kingma & Welling, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


class Objective(nn.Module):
    """Reconstruction + KL + perceptual + adversarial; each term may be switched off.

    The discriminator belongs to the objective; its own loss is stepped by the trainer.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self.config = config
        self.perceptual = None if config.perceptual is None else load_lpips(config.perceptual)
        self.discriminator = (
            None
            if config.adversarial is None
            else PatchDiscriminator(config.adversarial.channels, config.adversarial.layers)
        )

    def adversarial_at(self, step: int) -> AdversarialConfig | None:
        """The adversarial term if it is on at this step."""
        term = self.config.adversarial
        return term if term is not None and step >= term.start_step else None

    def forward(self, r: Reconstruction, step: int) -> dict[str, Tensor]:
        """Weighted terms and their sum `loss`, each a scalar."""
        terms: dict[str, Tensor] = {}
        difference = r.output - r.image
        if self.config.reconstruction.l1:
            terms["l1"] = self.config.reconstruction.l1 * difference.abs().mean()
        if self.config.reconstruction.l2:
            terms["l2"] = self.config.reconstruction.l2 * difference.square().mean()
        if self.config.kl is not None:
            terms["kl"] = self.config.kl.weight * kl_divergence(r.mean, r.logvar)
        if self.perceptual is not None and self.config.perceptual is not None:
            distance = self.perceptual(r.output, r.image).mean()
            terms["perceptual"] = self.config.perceptual.weight * distance
        adversarial = self.adversarial_at(step)
        if adversarial is not None and self.discriminator is not None:
            terms["adversarial"] = adversarial.weight * generator_loss(self.discriminator(r.output))
        terms["loss"] = torch.stack(list(terms.values())).sum()
        return terms


def load_lpips(config: PerceptualConfig) -> nn.Module:
    """LPIPS on VGG (Zhang et al. 2018), frozen, from the optional `lpips` package.

    Raises:
        ValueError: the package or its VGG weights cannot be had on this machine.
    """
    fix = "install lpips and give perceptual.weights_path, or set objective.perceptual=null"
    try:
        import lpips  # pyright: ignore[reportMissingImports]  # optional dependency
    except ImportError as error:
        raise ValueError(f"the perceptual term needs the package lpips; {fix}") from error
    path = config.weights_path
    if path is None:
        try:
            return lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False).eval()
        except OSError as error:
            raise ValueError(f"VGG's weights could not be fetched ({error}); {fix}") from error
    if not Path(path).is_file():
        raise ValueError(f"perceptual.weights_path {path} is not a file; {fix}")
    from safetensors.torch import load_file

    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    network.net.load_state_dict(load_file(path))
    return network.requires_grad_(False).eval()
