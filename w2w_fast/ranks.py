"""Several processes at one fit: ``torchrun --nproc-per-node 2 -m w2w_fast fit ...``.

Every rank runs the same lines on its own share of the blocks, and sums are made equal with
all_reduce; the first rank alone writes. Without torchrun there is one rank and nothing is sent.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from .errors import InputError

T = TypeVar("T")


def rank() -> int:
    """This process's place among them, from 0."""
    return dist.get_rank() if _several() else 0


def share(items: Sequence[T]) -> Sequence[T]:
    """The items that are this rank's."""
    return items[rank() :: dist.get_world_size()] if _several() else items


def total(tensor: Tensor) -> Tensor:
    """The sum over the ranks of a tensor that each has, in place."""
    if _several():
        dist.all_reduce(tensor)
    return tensor


def same(tensor: Tensor) -> Tensor:
    """The first rank's, in place."""
    if _several():
        dist.broadcast(tensor, 0)
    return tensor


def agree(problem: str | None) -> None:
    """InputError on every rank where one of them has a problem: nobody waits for who gave up."""
    if _several():
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, problem)
        problem = next((text for text in found if text), None)
    if problem:
        raise InputError(problem)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Meet the other ranks where torchrun started several, and part from them at the end.

    An InputError is everybody's: the first rank raises it, the others end with exit code 2.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    try:
        yield
    except InputError:
        if rank():
            raise SystemExit(2) from None
        raise
    finally:
        dist.destroy_process_group()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
