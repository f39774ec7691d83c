"""How do processes share a run? The only file that imports torch.distributed.

Models are written for one device and wrapped here afterwards. Losses are shares of the whole
step's, so gradients are summed over ranks, not averaged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from latentdiff.configtraining import ParallelConfig
from latentdiff.devices import resolve_device

Mode = Literal["none", "ddp", "fsdp"]

_PATIENCE = timedelta(hours=2)  # longer than the watchdog's, which can name who does not come


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Attributes:
        device: this rank's.
        rank: of this process.
        num_ranks: processes.
        local_rank: of this process on its machine.
        store: key-value store that all ranks reach; None for a process alone.
    """

    device: torch.device
    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    store: Any = None
    _control: Any = field(default=None, repr=False)  # gloo group for what is on the host
    _timeout: timedelta = field(default=_PATIENCE, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and speaks for all."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, on all of them; the tensor itself for one rank."""
        if self._control is None:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total, group=self._control if total.device.type == "cpu" else None)
        return total

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on all of them; through the host."""
        if self._control is None:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value, group=self._control)
        return values

    def broadcast(self, value: Any) -> Any:
        """The first rank's value, on all of them; through the host."""
        if self._control is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.gather(None)

    def post(self, words: Tensor) -> Any:
        """Begin the maximum over ranks of a small integer tensor on the CPU, in place.

        Returns:
            A handle whose `wait()` ends when `words` holds the maximum; None for one rank.
        """
        if self._control is None:
            return None
        return dist.all_reduce(words, dist.ReduceOp.MAX, group=self._control, async_op=True)

    def side_group(self) -> World:
        """The same ranks with a line of their own, for another thread; all must call it."""
        return self if self._control is None else replace(self, _control=_gloo(self._timeout))


def join(device: str, parallel: ParallelConfig) -> World:
    """Take part in the run that torchrun, srun or nobody has launched this process for.

    Args:
        device: `auto`, `cpu`, `cuda` (each rank takes its own GPU), or a device by name.
        parallel: mode, and after how long a rank has stalled.

    Raises:
        ValueError: no such device, a mode that does not fit the number of ranks, or an environment
            that names no meeting point.
    """
    rank, num_ranks, local_rank = _place()
    _check_mode(parallel, num_ranks)
    found = resolve_device(device)
    if found.type == "cuda":
        if found.index is None:
            alone = torch.cuda.device_count() == 1  # SLURM may show each task its own GPU only
            found = resolve_device(f"cuda:{0 if alone else local_rank}")
        torch.cuda.set_device(found)
    if num_ranks == 1 and "RANK" not in os.environ and parallel.mode != "fsdp":
        return World(found)
    timeout = timedelta(seconds=parallel.timeout_s) + _PATIENCE
    if "RANK" in os.environ or num_ranks > 1:
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise ValueError(
                f"{num_ranks} processes were launched, but {' and '.join(missing)} are not set; "
                "start them by torchrun, or export the first node's name and a free port"
            )
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks))
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
        # torchrun keeps one store over its restarts: addresses of ranks that are gone stay in it
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start-{start}", store)
    else:
        store = dist.HashStore()  # sharding over one process
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo",
        store=dist.PrefixStore("ranks", store),
        rank=rank,
        world_size=num_ranks,
        timeout=timeout,
        device_id=found if found.type == "cuda" else None,
    )
    own = dist.PrefixStore("run", store)
    return World(found, rank, num_ranks, local_rank, own, _gloo(timeout), timeout)


def check_alone(what: str) -> None:
    """Refuse several processes where one does the work, by a ValueError."""
    _, num_ranks, _ = _place()
    if num_ranks > 1:
        raise ValueError(
            f"{what} is trained by one process, but {num_ranks} were launched; start one, without "
            "torchrun"
        )


def leave() -> None:
    """Take part no longer."""
    if dist.is_initialized():
        dist.destroy_process_group()


def mode_of(parallel: ParallelConfig, world: World) -> Mode:
    """What `mode: auto` comes to: a whole copy each, where there are several ranks."""
    if parallel.mode != "auto":
        return parallel.mode
    return "ddp" if world.num_ranks > 1 else "none"


def wrap(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    parallel: ParallelConfig,
    precision: str,
    world: World,
    deterministic: bool = False,
) -> nn.Module:
    """The module as all ranks train it; its own parameters keep their names.

    Args:
        module: with weights on this rank's device, the same on all ranks.
        blocks: parts of it that fsdp gathers one at a time.
        parallel: how.
        precision: bf16 lets fsdp gather weights in bfloat16.
        world: the ranks.
        deterministic: ddp: do not rearrange the gradients after the first step (which looking for
            unused parameters prevents): the sums of a run that was resumed there would round
            otherwise. It is always so on the CPU.

    Returns:
        What is called for the forward pass.
    """
    match mode_of(parallel, world):
        case "none":
            return module
        case "ddp":
            copies = DistributedDataParallel(
                module,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=deterministic or world.device.type == "cpu",
            )
            copies.register_comm_hook(None, _sum_bucket)
            return copies
        case "fsdp":
            return _shard(module, blocks, parallel, precision, world)


@contextmanager
def reducing(network: nn.Module, is_last: bool) -> Iterator[None]:
    """Around the forward and backward pass of a micro-batch: ranks add up after the last one."""
    if isinstance(network, DistributedDataParallel) and not is_last:
        with network.no_sync():
            yield
        return
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(is_last)
    yield


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients as if nothing were sharded, 0-dim, the same on all ranks."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together (all ranks must call it); any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether the ranks keep parts of it."""
    return isinstance(tensor, DTensor)


def reshard(network: nn.Module) -> None:
    """Forget gathered weights: after the parts were changed in place, they would be stale."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def save_shards(directory: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Write tensors, sharded or not, as safetensors files: each rank its parts; nothing twice.

    Raises:
        OSError: it cannot be written.
    """
    writer = _ShardWriter(str(directory), save_distributed=True)
    alone = world._control is None
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with _as_os_error():
        dcp.save(plain, storage_writer=writer, process_group=world._control, no_dist=alone)


def load_shards(directory: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Fill tensors in place from what `save_shards` wrote, however it was sharded then."""
    reader = HuggingFaceStorageReader(str(directory))
    alone = world._control is None
    with _as_os_error():
        dcp.load(dict(tensors), storage_reader=reader, process_group=world._control, no_dist=alone)


class _ShardWriter(HuggingFaceStorageWriter):
    """Its base's format, streamed to the file: the training goes on in other threads meanwhile.

    The base makes all bytes in memory first, a second copy, and holds the interpreter's lock.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors: dict[str, Tensor] = {}
        places: dict[str, dict[str, list[int]]] = {}
        results: list[WriteResult] = []
        for item in plan.items:
            name, tensor = item.index.fqn, planner.resolve_data(item)
            assert isinstance(tensor, Tensor) and item.tensor_data is not None, name
            tensors[name] = tensor.detach().cpu().contiguous()
            places[name] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
            results.append(WriteResult(item.index, tensor.nbytes, None))
        if tensors:
            path = Path(self.path) / f"shard-{plan.storage_data['shard_index']:05d}.safetensors"
            save_file(tensors, path, {"DCP_SHARDING_INFO": json.dumps(places), "format": "pt"})
            with path.open("rb") as file:
                os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Turn torch's own exception, which is no Exception, into an OSError."""
    try:
        yield
    except CheckpointException as error:
        told = "; ".join(f"rank {rank}: {found[0]}" for rank, found in error.failures.items())
        raise OSError(told) from error


def _shard(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    parallel: ParallelConfig,
    precision: str,
    world: World,
) -> nn.Module:
    """FSDP2 over the blocks, then over what is left."""
    module.to(memory_format=torch.contiguous_format)  # it shards no other format
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.bfloat16 if parallel.reduce_dtype == "bf16" else torch.float32,
        cast_forward_inputs=False,  # bfloat16 has no 999; autocast knows what to cast
    )
    mesh = _mesh(parallel, world)
    pinned = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    offload = pinned if parallel.cpu_offload else OffloadPolicy()
    for part in (*blocks, module):
        sharded = fully_shard(
            part,
            mesh=mesh,
            reshard_after_forward=parallel.reshard_after_forward,
            mp_policy=policy,
            offload_policy=offload,
        )
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    return module


def _mesh(parallel: ParallelConfig, world: World) -> DeviceMesh:
    kind, ranks = world.device.type, parallel.shard_ranks
    if ranks is None or ranks == world.num_ranks:
        return init_device_mesh(kind, (world.num_ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(
        kind, (world.num_ranks // ranks, ranks), mesh_dim_names=("replicate", "shard")
    )


def _sum_bucket(state, bucket):  # DDP compares annotations with types; here they are strings
    """What DDP does with a bucket of gradients: a future of their sum over the ranks."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


def _gloo(timeout: timedelta) -> Any:
    return dist.new_group(backend="gloo", timeout=timeout)


def _place() -> tuple[int, int, int]:
    """(rank, ranks, rank on this machine), as torchrun says, or SLURM."""
    for names in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        if all(name in os.environ for name in names):
            rank, num_ranks, local_rank = (int(os.environ[name]) for name in names)
            return rank, num_ranks, local_rank
    return 0, 1, 0


def _check_mode(parallel: ParallelConfig, num_ranks: int) -> None:
    if parallel.mode == "none" and num_ranks > 1:
        raise ValueError(
            f"parallel.mode is none, but {num_ranks} processes were launched; set "
            "parallel.mode=ddp or fsdp, or start one process"
        )
    ranks = parallel.shard_ranks
    if ranks is not None and num_ranks % ranks:
        raise ValueError(
            f"parallel.shard_ranks must divide the number of ranks; got {ranks} for {num_ranks}; "
            "choose a divisor, or null for all of them"
        )
