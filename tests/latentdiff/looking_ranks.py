"""What the ranks of the run's looks compute: validation, grid and metrics; results as JSON."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from looking import looking_run, trainee

from latentdiff.parallel import join, leave, reshard
from latentdiff.training.evaluation import evaluate, prepare_evaluation
from latentdiff.training.sampling import draw_grid
from latentdiff.training.validation import read_validation, validation_loss


def look(assets: Path, parts: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Validate, draw, judge, train a step, validate again."""
    config = looking_run(assets, parts, **changes)
    found = trainee(config, WORLD)
    model, network = found.model, found.network
    held = read_validation(model, config, WORLD)
    first = validation_loss(model, network, held, config, WORLD)
    sheet = draw_grid(model, network, config, WORLD)
    judged = prepare_evaluation(model, config, WORLD)
    scores = evaluate(model, network, judged, config, WORLD)

    optimizer = torch.optim.SGD(found.weights.values(), lr=0.1)
    noisy = torch.ones(2, 4, 16, 16)
    assert model.text is not None
    ids = model.text.tokenize(["a cat", "a tree"])
    cond = None if config.train_text else model.text.encode_ids(ids)
    loss = network(noisy, torch.ones(2), ids, cond).square().mean()
    (loss * WORLD.is_first).backward()  # the sum over ranks is then one rank's to the bit
    optimizer.step()
    reshard(network)
    second = validation_loss(model, network, held, config, WORLD)
    return {
        "first": [first.loss, first.plain, *first.by_timestep],
        "second": second.loss,
        "kept": sorted(held.chunks),
        "grid": None if sheet is None else hashlib.sha256(sheet.tobytes()).hexdigest(),
        "scores": scores,
        "training": network.training,
    }


if __name__ == "__main__":
    root, runs = Path(sys.argv[1]), json.loads(sys.argv[3])
    WORLD = join("cpu", looking_run(Path(sys.argv[2]), root, **runs[0]).parallel)
    results = [look(Path(sys.argv[2]), root, run) for run in runs]
    place = root / f"{WORLD.num_ranks}-ranks"
    place.mkdir(exist_ok=True)
    (place / f"{WORLD.rank}.json").write_text(json.dumps(results))
    leave()
