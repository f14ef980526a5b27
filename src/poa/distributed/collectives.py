"""What processes tell each other. With a single process each function is the identity or its plain counterpart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributed as dist

from poa.distributed.ranks import Ranks, is_started
from poa.errors import PoaError, TrainingError

ValueT = TypeVar("ValueT")


def all_sum(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The sum of `x` over all processes."""
    if not is_started():
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def logsumexp_over_ranks(x: Float[Tensor, "R K"]) -> Float[Tensor, "1 K"]:
    """The logarithm of Σ exp over the rows of all processes, which may have different numbers of them, also none."""
    own = torch.logsumexp(x, dim=0, keepdim=True)
    if not is_started():
        return own
    top = own.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    # Where no process has a row, all is −∞: shifting by 0 keeps it so.
    shift = torch.where(top.isfinite(), top, 0.0)
    return all_sum(torch.exp(own - shift)).log() + shift


class _GatheredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401 (torch's context)
        ctx.rows = slice(dist.get_rank() * len(x), (dist.get_rank() + 1) * len(x))
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401 (torch's context)
        return all_sum(grad)[ctx.rows]


def gathered_rows(x: Float[Tensor, "R C"]) -> Float[Tensor, "_ C"]:
    """The rows of all processes, in their order; each process has equally many.

    Differentiable: a row's gradient is the sum of those that all processes have for it.
    """
    if not is_started():
        return x
    found: Tensor = _GatheredRows.apply(x)
    return found


def own_row_offset(num_rows: int) -> int:
    """Where this process's rows begin among those that `gathered_rows` gives, each process having `num_rows`."""
    return dist.get_rank() * num_rows if is_started() else 0


def gathered_values(value: ValueT) -> list[ValueT]:
    """The value of every process, in their order; any that can be pickled. Only processes of one run read it."""
    if not is_started():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


@contextmanager
def agreed(ranks: Ranks) -> Iterator[None]:
    """A part of the set-up that succeeds on all processes or fails on all, with the same `PoaError`.

    Without it, the others would wait for a process that has given up.

    Raises:
        PoaError: that of the first process that has one. On the others it counts as told.
    """
    own: PoaError | None = None
    try:
        yield
    except PoaError as error:
        own = error
    errors = gathered_values(None if own is None else (type(own), str(own)))
    first = next((number for number, found in enumerate(errors) if found is not None), None)
    if own is not None and first == ranks.rank:
        raise own
    if first is not None and (found := errors[first]) is not None:
        kind, text = found
        told = kind(text)
        told.is_told = True
        raise told


@contextmanager
def lost_processes_told(ranks: Ranks) -> Iterator[None]:
    """Words the end of another process, which this one notices when they talk, for people.

    Raises:
        TrainingError: another process has ended.
    """
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        # gloo has no class of errors of its own.
        if ranks.num_ranks == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise TrainingError(
            "another process of the run has ended, so this one ends too. The one that ended first says why. The run "
            "goes on from its newest checkpoint when all are started again (torchrun --max-restarts does it)."
        ) from error
