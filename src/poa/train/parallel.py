"""How several processes train one student: DDP, or FSDP2 with or without groups that hold a copy each (HSDP)."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from poa.config import ParallelConfig
from poa.elastic import Subnet
from poa.errors import ConfigError
from poa.objective import PoaModel, Views
from poa.objective.poa import Branch, BranchOutput
from poa.runtime import Runtime


class Alone:
    """The student of a single process. The subclasses are those of several, which train it together.

    Made once, before the optimiser. Every process calls `student` equally often, with sub-networks of its own, each
    time followed by the backward pass. After the last one and `finish_gradients_` all have the mean of their gradients.
    """

    def __init__(self, branch: nn.Module) -> None:
        self.branch = branch

    def student(self, views: Views, subnet: Subnet, rows_rng: torch.Generator | None = None) -> BranchOutput:
        """See `Branch.forward`."""
        found: BranchOutput = self.branch(views, subnet, rows_rng)
        return found

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[object]:  # noqa: ARG002 (for subclasses)
        """Around a forward and its backward pass: gradients only add up, but for the step's last pass."""
        return nullcontext()

    def finish_gradients_(self) -> None:
        """Ends the backward passes of a step."""
        return


class Replicated(Alone):
    """Every process has the whole model; the gradients are averaged while the step's last backward pass runs (DDP)."""

    def __init__(self, model: PoaModel) -> None:
        # Sub-networks lack blocks, so a pass may not use every parameter. torch warns where the first one lacks none.
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified in DDP constructor")
        self.ddp = DistributedDataParallel(model.student, find_unused_parameters=True, gradient_as_bucket_view=True)
        super().__init__(self.ddp)

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[object]:
        """See `Alone.accumulating`."""
        return nullcontext() if is_last else self.ddp.no_sync()


class Sharded(Alone):
    """Weights, gradients, optimiser and teacher are divided among the processes (FSDP2), block by block.

    The processes may train different sub-networks, so a pass must not wait for blocks that others leave out. The
    student's weights are therefore gathered in its first pass of a step, which is the intact network's on every
    process, and kept to the end of the step; its gradients are summed up over the processes once, by
    `finish_gradients_`, in an order that does not depend on the sub-networks. The teacher's weights are gathered block
    by block and let go again.
    """

    def __init__(self, model: PoaModel, mesh: DeviceMesh) -> None:
        # Outputs are views of one another here; nothing changes them in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        _shard(model.teacher, mesh, keep=False)
        fully_shard(model.teacher, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(model.teacher.backbone, "last_blocks")  # what the monitor calls
        _shard(model.student, mesh, keep=True)
        root = _StudentOrNothing(model.student)
        self.sharding: FSDPModule = fully_shard(root, mesh=mesh, reshard_after_forward=False)
        super().__init__(root)

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[object]:  # noqa: ARG002 (the same for all)
        """See `Alone.accumulating`."""
        self._sum_up_(False)
        return nullcontext()

    def finish_gradients_(self) -> None:
        """See `Alone.finish_gradients_`: an empty backward pass, at whose end FSDP sums up what is left to sum."""
        self._sum_up_(True)
        self.branch(None, None, None).backward()

    def _sum_up_(self, now: bool) -> None:
        self.sharding.set_requires_gradient_sync(now)
        self.sharding.set_reshard_after_backward(now)


class _StudentOrNothing(nn.Module):
    """A student that can also be called without a batch, for a backward pass that adds nothing to its gradients."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch = branch
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, views: Views | None, subnet: Subnet | None, rows_rng: torch.Generator | None) -> object:
        """The student's output; without a batch a zero that has a gradient."""
        if views is None or subnet is None:
            return self.anchor.sum()
        return self.branch(views, subnet, rows_rng)


def _shard(branch: Branch, mesh: DeviceMesh, *, keep: bool) -> None:
    """Divides the blocks, what else the backbone has, and the heads, each on its own."""
    for module in (*branch.backbone.block_modules(), branch.backbone, *branch.heads.heads):
        fully_shard(module, mesh=mesh, reshard_after_forward=not keep)


def parallelize_(model: PoaModel, config: ParallelConfig, runtime: Runtime) -> Alone:
    """Divides the model among the processes as the configuration says, in place; a single one has nothing to divide.

    Raises:
        ConfigError: the processes cannot be divided into groups of `shard_size`.
    """
    ranks = runtime.ranks
    if ranks.num_ranks == 1:
        return Alone(model.student)
    if config.mode != "fsdp":
        return Replicated(model)
    size = config.shard_size or ranks.num_ranks
    if ranks.num_ranks % size:
        divisors = ", ".join(str(n) for n in range(1, ranks.num_ranks + 1) if ranks.num_ranks % n == 0)
        raise ConfigError(
            f"parallel.shard_size must be a divisor of the number of processes {ranks.num_ranks}; got {size}. "
            f"Divisors: {divisors}."
        )
    kind = runtime.device.type
    if size == ranks.num_ranks:
        return Sharded(model, init_device_mesh(kind, (size,), mesh_dim_names=("shard",)))
    shape = (ranks.num_ranks // size, size)
    return Sharded(model, init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard")))
