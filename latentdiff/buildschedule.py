"""How does a schedule's config become a forward process?"""

from __future__ import annotations

import torch

from latentdiff import configschedule
from latentdiff.configschedule import ScheduleConfig
from latentdiff.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, Schedule


def build_schedule(config: ScheduleConfig) -> Schedule:
    """The forward process that a config describes."""
    match config:
        case configschedule.FlowSchedule():
            return FlowSchedule(**config.model_dump(exclude={"kind"}))
        case configschedule.EDMSchedule():
            return EDMSchedule(**config.model_dump(exclude={"kind"}))
        case configschedule.BetasSchedule():
            return NoiseSchedule.from_betas(torch.tensor(config.betas, dtype=torch.float64))
    shape = config.model_dump(exclude={"kind", "zero_terminal_snr"})
    match config:
        case configschedule.LinearSchedule():
            schedule = NoiseSchedule.linear(**shape)
        case configschedule.ScaledLinearSchedule():
            schedule = NoiseSchedule.scaled_linear(**shape)
        case configschedule.BetaSigmoidSchedule():
            schedule = NoiseSchedule.beta_sigmoid(**shape)
        case configschedule.CosineSchedule():
            schedule = NoiseSchedule.cosine(**shape)
        case configschedule.SigmoidSchedule():
            schedule = NoiseSchedule.sigmoid(**shape)
    return schedule.zero_terminal_snr() if config.zero_terminal_snr else schedule
