"""What does a user of diffusers run? One picture, from the shell to the PNG.

python benchmarks/sample_user.py MODEL DTYPE START.safetensors STEPS GUIDANCE PROMPT OUT.png
"""

import sys
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

model, dtype, start, steps, guidance, prompt, out = sys.argv[1:]
pipe: Any = StableDiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype))
image = pipe(
    prompt,
    latents=load_file(start)["start"].to(pipe.unet.dtype),  # so that all draw the same picture
    num_inference_steps=int(steps),
    guidance_scale=float(guidance),
).images[0]
image.save(out)
