"""How do diffusers' modules attend with a back-end of ours? For what the lean networks are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.nn import functional as F

from latentdiff.attention_kernels import Attend


def use_attention(model: Any, attend: Attend) -> None:
    """Let every attention layer of a diffusers model call `attend`, for inference.

    Args:
        model: UNet2DConditionModel, UNet2DModel or AutoencoderKL.
        attend: (q, k, v) -> result; see `latentdiff.attention.choose`.

    Raises:
        ValueError: a layer of the model does more than attend, and has to do it its own way.
    """
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    # not model.attn_processors, which UNet2DModel does not have
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Attention)}
    for name, layer in layers.items():
        if not isinstance(layer.processor, (AttnProcessor, AttnProcessor2_0, _Processor)):
            raise ValueError(
                f"{type(model).__name__} attends with {type(layer.processor).__name__} in {name}; "
                "expected diffusers' plain attention; use --attention auto with this model"
            )
    for layer in layers.values():
        layer.set_processor(cast(Any, _Processor(attend)))


@dataclass(frozen=True)
class _Processor:
    """What diffusers' Attention module calls with itself and its input."""

    attend: Attend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attention to itself or to text, with all that diffusers' module keeps around it.

        Args:
            attn: the module.
            hidden_states: [b, n, c] or [b, c, h, w]; returned in the same shape.
            encoder_hidden_states: text [b, m, d], or None for attention to itself.
            attention_mask: added to the scores; no back-end but torch's own choice takes one.
            temb: for a norm that depends on it.
        """
        x = hidden_states
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        if hidden_states.ndim == 4:
            x = x.flatten(2).transpose(1, 2)  # [b, h*w, c]
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        source = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            source = attn.norm_encoder_hidden_states(source)
        projected = (attn.to_q(x), attn.to_k(source), attn.to_v(source))
        q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in projected)
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if attention_mask is None:
            x = self.attend(q, k, v)  # [b, heads, n, head_dim]
        else:
            mask = attn.prepare_attention_mask(attention_mask, source.shape[1], len(q))
            mask = mask.unflatten(0, (len(q), -1))
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x.transpose(1, 2).flatten(2).to(q.dtype)
        x = attn.to_out[1](attn.to_out[0](x))
        if hidden_states.ndim == 4:
            x = x.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            x = x + hidden_states
        return x / attn.rescale_output_factor
