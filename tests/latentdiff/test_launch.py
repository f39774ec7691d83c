"""Do the files under configs/launch say what the launchers of today understand?"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

BASH = "#!/bin/bash\n"


@pytest.fixture
def launch(repository: Path) -> Path:
    return repository / "configs" / "launch"


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(BASH + script)
    path.chmod(0o755)


def submit(launch: Path, tmp_path: Path, code: int, restarts: int = 0) -> tuple[int, list[str]]:
    """The job's exit code and what it asked of SLURM, if srun ends with `code`."""
    calls = tmp_path / "calls"
    calls.write_text("")
    program(tmp_path, "srun", f'echo srun "$@" "$MASTER_ADDR:$MASTER_PORT" >> {calls}\nexit {code}')
    program(
        tmp_path,
        "scontrol",
        f'echo scontrol "$@" >> {calls}\n[ "$1" = show ] && printf "node7\\nnode8\\n"\nexit 0',
    )
    done = subprocess.run(
        ["bash", str(launch / "slurm.sbatch"), "ldm_emoji", "loop.num_steps=5"],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[7-8]",
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
        },
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return done.returncode, calls.read_text().splitlines()


@pytest.mark.parametrize("code", [0, 1, 2, 69, 70, 74, 75, 137])
def test_slurm_requeues_what_is_worth_it(launch: Path, tmp_path: Path, code: int) -> None:
    ended, calls = submit(launch, tmp_path, code)
    assert ended == code
    assert calls[:2] == [
        "scontrol show hostnames node[7-8]",
        "srun --kill-on-bad-exit=0 --wait=60 python -m latentdiff train --config ldm_emoji "
        "loop.num_steps=5 node7:23456",
    ]
    assert calls[2:] == (["scontrol requeue 123456"] if code in (69, 75, 137) else [])


def test_slurm_does_not_requeue_for_ever(launch: Path, tmp_path: Path) -> None:
    assert len(submit(launch, tmp_path, 75, restarts=19)[1]) == 3
    assert len(submit(launch, tmp_path, 75, restarts=20)[1]) == 2


def test_slurm_signals_the_tasks_and_leaves_them_time(launch: Path) -> None:
    lines = (launch / "slurm.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert "--signal=USR1@300" in options and "--requeue" in options
    tasks, gpus = ("--ntasks-per-node=8", "--gpus-per-node=8")
    assert tasks in options and gpus in options


def torchrun_arguments(words: list[str]) -> Any:
    return get_args_parser().parse_args(words)


def test_torchrun_understands_the_script(launch: Path, tmp_path: Path) -> None:
    program(tmp_path, "torchrun", 'printf "%s\\n" "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" "$@"')
    done = subprocess.run(
        [str(launch / "torchrun.sh"), "host:29400", "2:8", "ldm_emoji", "seed=1"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    unshared, *words = done.stdout.splitlines()
    found = torchrun_arguments(words)
    assert unshared == "1"
    assert (found.nnodes, found.nproc_per_node, found.max_restarts) == ("2:8", "gpu", 3)
    assert (found.rdzv_backend, found.rdzv_endpoint) == ("c10d", "host:29400")
    assert found.shutdown_timeout == 300 and "SIGUSR1" in found.signals_to_handle
    assert found.module and found.training_script == "latentdiff"
    assert found.training_script_args == ["train", "--config", "ldm_emoji", "seed=1"]


def test_the_pods_end_after_torchrun_has(launch: Path) -> None:
    job = yaml.safe_load((launch / "pytorchjob.yaml").read_text())
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["restartPolicy"] == "OnFailure"  # ExitCode would take 1 and 75 as permanent
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert container["command"] == ["/bin/bash", "-c"]
    executes, launcher, *words = container["args"][0].split()
    assert (executes, launcher) == ("exec", "torchrun")
    found = torchrun_arguments(words)
    assert found.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    assert found.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert found.training_script_args[:2] == ["train", "--config"]
    assert {entry["name"]: entry["value"] for entry in container["env"]}[
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    ] == "1"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    out = next(word for word in words if word.startswith("out="))
    assert out.removeprefix("out=").startswith(mounts["runs"] + "/")
