"""How do ranks come to one verdict about work that may fail on one of them?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from latentdiff.parallel import World

Result = TypeVar("Result")


def on_all(world: World, work: Callable[[], Result]) -> list[Result]:
    """Do some work on every rank; the results of all of them, on all of them.

    Raises:
        ValueError: the first rank that failed did so with one.
        OSError: it failed with anything else. The same is raised on every rank.
    """
    return _settled(world, *_tried(work))


def on_first(world: World, work: Callable[[], Result]) -> Result:
    """Do some work on the first rank alone; its result, on all ranks; raises as `on_all`."""
    done, error = _tried(work) if world.is_first else ([], None)
    return _settled(world, done, error)[0]


def _tried(work: Callable[[], Result]) -> tuple[list[Result], BaseException | None]:
    try:
        return [work()], None
    except BaseException as error:  # a rank that went its own way would leave the others waiting
        return [], error


def _settled(world: World, done: list[Result], error: BaseException | None) -> list[Result]:
    message = None if error is None else (isinstance(error, ValueError), _told(error))
    outcomes: list[tuple[list[Result], tuple[bool, str] | None]] = world.gather((done, message))
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            is_value_error, text = failure
            place = f"rank {rank}: " if world.num_ranks > 1 else ""
            raise (ValueError if is_value_error else OSError)(f"{place}{text}") from error
    return [result for results, _ in outcomes for result in results]


def _told(error: BaseException) -> str:
    """What went wrong, in a line; of a text that quotes other ranks' errors, its end."""
    lines = str(error).strip().splitlines()
    if len(lines) > 1:
        return lines[-1].strip()
    if lines and isinstance(error, ValueError | OSError):
        return lines[0]
    return ": ".join([type(error).__name__, *lines])
