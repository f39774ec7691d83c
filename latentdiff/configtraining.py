"""How does a run move, on how many devices, and what does it keep, watch and judge?"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from data_pipelines.config import DataConfig
from latentdiff.configbase import Frozen


class ParameterGroupConfig(Frozen):
    r"""Parameters that move at another pace.

    Attributes:
        match: regular expression that is searched for in a parameter's name ("^text\.",
            "attn2\.to_k"); the first group that matches has it.
        lr_scale: times the learning rate.
        weight_decay: instead of the optimiser's; null keeps that.
    """

    match: str
    lr_scale: float = Field(default=1.0, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)


class OptimizerConfig(Frozen):
    """The optimiser, and its rate: linear warm-up, then `decay` to `final_lr_ratio * lr`.

    Attributes:
        kind: adamw; adamw8bit (its state in 8 bits, by torchao); adafactor; muon (matrices by Muon,
            all else by AdamW).
        lr: rate after the warm-up.
        betas: of the AdamW kinds.
        eps: of the AdamW kinds.
        weight_decay: of matrices and kernels; norms and biases never decay.
        groups: parameters of another pace.
        warmup_steps: with a rising rate.
        decay: constant, cosine, linear, or wsd: constant and at last `decay_steps` of linear decay
            (Hu et al. 2024, MiniCPM).
        decay_steps: of wsd.
        final_lr_ratio: where the decay ends.
        max_grad_norm: gradients of a larger norm are scaled down to it; null for none.
    """

    kind: Literal["adamw", "adamw8bit", "adafactor", "muon"] = "adamw"
    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    groups: tuple[ParameterGroupConfig, ...] = ()
    warmup_steps: int = Field(default=500, ge=0)
    decay: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    decay_steps: int | None = Field(default=None, ge=1)
    final_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    max_grad_norm: float | None = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _wsd_has_an_end(self) -> OptimizerConfig:
        if (self.decay == "wsd") != (self.decay_steps is not None):
            raise ValueError(
                "decay wsd, and no other, needs decay_steps, the steps of its last part; got decay "
                f"{self.decay} and decay_steps {self.decay_steps}"
            )
        return self


class EmaConfig(Frozen):
    """Averages of the weights, for pictures, validation and export.

    Attributes:
        kind: constant: decay min(decay, (1 + n) / (10 + n)) at update n; power: the power-function
            averages of EDM2 (Karras et al. 2024, section 3.1), one for each length.
        decay: of kind constant.
        sigma_rel: lengths of kind power, as shares of the run so far; pictures, validation and
            export use the first.
        start_step: before it the average is the weights themselves.
        every: optimiser steps between two updates; the decay is taken to this power.
    """

    kind: Literal["constant", "power"] = "constant"
    decay: float = Field(default=0.9999, ge=0, lt=1)
    sigma_rel: tuple[float, ...] = Field(default=(0.1, 0.05), min_length=1)
    start_step: int = Field(default=0, ge=0)
    every: int = Field(default=1, ge=1)

    @field_validator("sigma_rel")
    @classmethod
    def _lengths(cls, lengths: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < length < 0.25 for length in lengths) or len({*lengths}) < len(lengths):
            raise ValueError(f"sigma_rel must be different lengths in (0, 0.25); got {lengths}")
        return lengths


class LoopConfig(Frozen):
    """How long, how much at a time, and what is written how often (in optimiser steps).

    Attributes:
        num_steps: optimiser steps.
        batch_size: samples a step, over all ranks and micro-batches.
        accumulation: micro-batches a step and rank; divides batch_size.
        precision: bf16 runs the networks in bfloat16; weights and optimiser stay float32.
        device: auto | cpu | cuda | cuda:N.
        log_every: steps between scalars.
        sample_every: steps between sample grids or sheets; null for none.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many of the latest are kept.
        channels_last: memory format of convolutions.
    """

    num_steps: int = Field(ge=1)
    batch_size: int = Field(default=64, ge=1)
    accumulation: int = Field(default=1, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
    log_every: int = Field(default=50, ge=1)
    sample_every: int | None = Field(default=1000, ge=1)
    checkpoint_every: int = Field(default=1000, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    channels_last: bool = True

    @model_validator(mode="after")
    def _divides(self) -> LoopConfig:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation must divide batch_size; got {self.batch_size} / "
                f"{self.accumulation}; choose a divisor"
            )
        return self


class DiffusionLoopConfig(LoopConfig):
    """The loop of a diffusion model.

    Attributes:
        keep_every: checkpoints at multiples of this are kept for good; null for none.
        keep_best: the checkpoint with the lowest validation loss is kept too.
        async_save: checkpoints are written beside the training, from a copy of their own.
        log_positions: write `positions.jsonl`: what every step trained on, and its noise.
        deterministic: algorithms that give the same bits each time, where a GPU has faster ones;
            a CPU has no others. A resumed run then equals the uninterrupted one to the bit.
    """

    keep_every: int | None = Field(default=None, ge=1)
    keep_best: bool = True
    async_save: bool = True
    log_positions: bool = False
    deterministic: bool = False


class ParallelConfig(Frozen):
    """How processes share the work, and what saves their memory; the model knows nothing of it.

    Attributes:
        mode: none (one process), ddp (a whole copy each), fsdp (each keeps a part: FSDP2), or auto:
            none for one process, ddp for several.
        shard_ranks: fsdp: ranks that share one copy (hybrid sharding); null: all of them.
        reshard_after_forward: fsdp: free a block's weights between forward and backward.
        reduce_dtype: fsdp: precision in which gradients are summed over ranks.
        cpu_offload: fsdp: weights and optimiser state stay in the host's memory.
        activation_checkpointing: compute a block's activations again in the backward pass.
        compile: compile the networks block by block.
        timeout_s: a rank that comes to no step for so long is stalled, and the run ends.
    """

    mode: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    shard_ranks: int | None = Field(default=None, ge=1)
    reshard_after_forward: bool = True
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    cpu_offload: bool = False
    activation_checkpointing: bool = False
    compile: bool = False
    timeout_s: float = Field(default=600.0, gt=0)

    @model_validator(mode="after")
    def _fsdp_only(self) -> ParallelConfig:
        if self.mode != "fsdp" and (self.shard_ranks is not None or self.cpu_offload):
            raise ValueError(
                f"shard_ranks and cpu_offload need mode fsdp; got mode {self.mode}; set mode=fsdp"
            )
        return self


class HealthConfig(Frozen):
    """When is a step not taken? All ranks come to the same verdict, from the gradients' norm.

    A step whose gradients are not finite is skipped: weights, optimiser and averages stay as they
    are, bit for bit.

    Attributes:
        spike_factor: a norm above this many times its running mean is skipped too; null for none.
        spike_warmup: steps before spikes are looked for.
        max_skips: skipped steps in a row that end the run.
    """

    spike_factor: float | None = Field(default=20.0, gt=1)
    spike_warmup: int = Field(default=100, ge=1)
    max_skips: int = Field(default=5, ge=1)


class LoggingConfig(Frozen):
    """Where scalars and pictures go besides `metrics.jsonl` and `samples/`.

    Attributes:
        to: any of tensorboard, wandb, mlflow, csv.
        project: name for wandb and mlflow.
        run_name: null: the run directory's name.
        timestep_bins: parts of the schedule with a loss of their own in the logs; 0 for none.
        peak_tflops: dense peak of one device in the run's precision, for MFU; null: known GPUs are
            looked up, others have no MFU.
    """

    to: tuple[Literal["tensorboard", "wandb", "mlflow", "csv"], ...] = ("tensorboard",)
    project: str = "latentdiff"
    run_name: str | None = None
    timestep_bins: int = Field(default=10, ge=0)
    peak_tflops: float | None = Field(default=None, gt=0)


class ValidationConfig(Frozen):
    """The loss on held-out pairs: fixed noise and timesteps, so it compares weights alone.

    Attributes:
        data: held-out shards, without random crops or flips; a caption, where there are several,
            is drawn once and for all.
        every: optimiser steps between two of them.
        num_samples: pairs, from the first on; fewer if there are no more.
        batch_size: pairs at a time on one rank.
        num_timesteps: of each pair, evenly over the schedule.
    """

    data: DataConfig
    every: int = Field(default=1000, ge=1)
    num_samples: int = Field(default=1024, ge=1)
    batch_size: int = Field(default=16, ge=1)
    num_timesteps: int = Field(default=4, ge=1)


class EvaluationConfig(Frozen):
    """Metrics of drawn pictures against held-out ones, in the run (torchmetrics).

    Attributes:
        data: held-out shards: the real pictures, and the captions that are drawn.
        metrics: any of fid, kid, clip_score.
        every: optimiser steps between two of them.
        num_images: that are drawn.
        batch_size: drawn at a time on one rank.
        features: the feature network of fid and kid, which need one: InceptionV3's weights as
            torch-fidelity names them, a .safetensors file; or an image model of transformers with
            safetensors, a directory or hub id.
        clip: directory of a transformers CLIP model, for clip_score.
    """

    data: DataConfig
    metrics: tuple[Literal["fid", "kid", "clip_score"], ...] = Field(default=("kid",), min_length=1)
    every: int = Field(default=10_000, ge=1)
    num_images: int = Field(default=1000, ge=2)
    batch_size: int = Field(default=16, ge=1)
    features: str | None = None
    clip: str | None = None

    @model_validator(mode="after")
    def _clip_is_named(self) -> EvaluationConfig:
        if "clip_score" in self.metrics and self.clip is None:
            raise ValueError(
                "metrics has clip_score, but clip is null; give the directory of a CLIP model"
            )
        return self
