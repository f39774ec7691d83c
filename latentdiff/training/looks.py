"""What is looked at during a run? Validation, pictures, metrics, by the averaged weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from latentdiff.config import DiffusionRun
from latentdiff.ema import Ema
from latentdiff.parallel import World, reshard
from latentdiff.training.evaluation import evaluate, prepare_evaluation
from latentdiff.training.log import RunLog
from latentdiff.training.sampling import draw_grid
from latentdiff.training.trainee import Trainee
from latentdiff.training.validation import read_validation, validation_loss
from latentdiff.training.watchdog import LONG_S, Watchdog


class Looks:
    """Held-out data that is read once, and what is done with it on a stride and at the end.

    All ranks must make it and call it alike.

    Args:
        config: the run.
        trainee: what is looked at.
        world: the ranks.
        watchdog: hears of each look.

    Raises:
        ValueError: held-out data or metrics' networks that cannot be used.
    """

    def __init__(
        self, config: DiffusionRun, trainee: Trainee, world: World, watchdog: Watchdog
    ) -> None:
        self._config, self._world, self._watchdog = config, world, watchdog
        self._model, self._network = trainee.model, trainee.network
        self._held = self._judged = None
        if config.validation is not None:
            self._held = read_validation(trainee.model, config, world)
        if config.evaluation is not None:
            self._judged = prepare_evaluation(trainee.model, config, world)

    def tell(self, log: RunLog) -> None:
        """Say what there is to look at, and what of it cannot be used."""
        if self._held is not None:
            log.line(f"validation: {self._held}")
        if self._judged is not None:
            log.line(f"evaluation: {self._judged.told}")

    def is_due(self, step: int) -> bool:
        """Whether there is anything to look at after `step` steps."""
        return any(self._due(every, step) for every in self._strides())

    def look(self, step: int, log: RunLog) -> float | None:
        """Validate, draw and judge what is due with the weights as they are.

        Returns:
            The validation loss; None if it was not due.
        """
        validate, sample, judge = (self._due(every, step) for every in self._strides())
        loss = None
        if validate and self._held is not None:
            self._watchdog.at("validate", step, LONG_S)
            found = validation_loss(
                self._model, self._network, self._held, self._config, self._world
            )
            loss = found.loss
            log.scalars(step, found.scalars)
        if sample:
            self._watchdog.at("sample", step, LONG_S)
            picture = draw_grid(self._model, self._network, self._config, self._world)
            if picture is not None:
                log.picture(step, "samples", picture)
        if judge and self._judged is not None:
            self._watchdog.at("evaluate", step, LONG_S)
            scores = evaluate(self._model, self._network, self._judged, self._config, self._world)
            log.scalars(step, scores)
        return loss

    def _strides(self) -> tuple[int | None, int | None, int | None]:
        """Steps between two validations, grids, evaluations; None for never."""
        validation, evaluation = self._config.validation, self._config.evaluation
        return (
            None if validation is None else validation.every,
            self._config.loop.sample_every,
            None if evaluation is None else evaluation.every,
        )

    def _due(self, every: int | None, step: int) -> bool:
        if every is None:
            return False
        return step % every == 0 or step == self._config.loop.num_steps


@contextmanager
def averaged(ema: Ema, network: nn.Module) -> Iterator[None]:
    """The network has the averaged weights inside the block, on every rank."""
    with ema.applied():
        reshard(network)
        yield
    reshard(network)
