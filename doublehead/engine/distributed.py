"""One process or many: rank, device, and agreement between processes.

`torchrun` describes the processes in environment variables; without it there is one.  Gradients
travel over the device's own backend (NCCL on CUDA, gloo on CPU); small host-side agreements
(stop now?  is every loss finite?) travel over a gloo group, so they never wait for the GPU.

No process waits for ever: a collective gives up after `TIMEOUT` (after `LONG`, where one process may have hours of
work that the others have not), gloo fails as soon as a peer is gone, and `World.on_main` carries an error of the main
process to all of them.

One failure, one message: the first process that fails records it in the rendezvous store; the
others, whose connections break as a result, end quietly.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from doublehead.engine.errors import PeerFailed, PeerLostError, PeerStopped
from doublehead.errors import UserError

TIMEOUT = timedelta(minutes=30)  # the main process alone computes the metrics, the others wait
LONG = timedelta(days=30)  # unequal shares of work: a process that is done waits for the others' trainings
GRACE = timedelta(seconds=3)  # for a failed process to say so, after a connection to it broke
_FAILURE = "doublehead/failure"
_BROKEN = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe|socket", re.IGNORECASE)
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of this job, as one of them sees it."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    control: Any = None
    """The gloo group of host-side messages; None with one process."""
    store: Any = None
    """The rendezvous store, where the first failure is recorded too; None with one process."""
    patient: Any = None
    """As `control`, for waits of up to `LONG`."""

    @property
    def is_main(self) -> bool:
        """Only this process writes files and prints."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on at least one process."""
        if self.size == 1:
            return bool(flag)
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control)
        return bool(value.item())

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean of `tensor` over the processes; the result lies on the host."""
        value = tensor.detach().to("cpu", copy=True)  # reduced in place
        if self.size > 1:
            dist.all_reduce(value, group=self.control)
        return value / self.size

    def gather(self, value: T) -> list[T]:
        """Every process's `value`, in rank order, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_on_main(self, value: T) -> list[T] | None:
        """Every process's `value` on the main process, None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def on_main(self, work: Callable[[], T], long: bool = False) -> T:
        """Run `work` on the main process; all get its result, or raise its exception.

        `long`: it may take longer than `TIMEOUT`.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.patient if long else self.control)
        if outcome[1] is not None:
            raise self.shared(outcome[1])
        return outcome[0]

    def shared(self, error: Exception) -> Exception:
        """Mark `error`, which all processes are about to raise, so that the main one alone shows it."""
        error.left_to_main = not self.is_main
        return error

    def give_way(self, error: BaseException) -> None:
        """Call this with the exception that ends this process; returns if this process is to show it.

        Raises:
            PeerFailed: another process failed first, and shows why; `PeerStopped`: it was asked to stop.
            PeerLostError: the connection to another process broke, and none recorded why within `GRACE`.
        """
        if self.size == 1 or isinstance(error, PeerFailed):
            return
        if getattr(error, "left_to_main", False):
            raise PeerFailed(_exit_code(error)) from None
        broken = isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or _BROKEN.search(str(error)))
        stopped = isinstance(error, (SystemExit, KeyboardInterrupt))
        try:
            if broken:
                self._wait_for_failure()
            mine = f"{self.rank} {_exit_code(error)} {'stopped' if stopped else 'failed'}"
            rank, code, how = self.store.compare_set(_FAILURE, "", mine).decode().split()
        except RuntimeError:  # the main process kept the store, and is gone
            if broken:
                print(f"stopped (rank {self.rank}): the main process is gone", file=sys.stderr, flush=True)
                raise PeerFailed(1) from None
            return
        if int(rank) != self.rank and (broken or how == "failed"):
            raise (PeerFailed if how == "failed" else PeerStopped)(int(code)) from None
        if broken:
            line = str(error).strip().splitlines()[0]
            raise PeerLostError(f"another process of this job died, killed or with its machine ({line})") from error

    def _wait_for_failure(self) -> None:
        with contextlib.suppress(dist.DistStoreError):  # nothing was recorded: the peer was killed
            self.store.wait([_FAILURE], GRACE)

    def share_buffers(self, model: torch.nn.Module) -> None:
        """Copy the main process's buffers to all: batch-norm statistics differ between ranks."""
        if self.size == 1:
            return
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)

    def barrier(self, long: bool = False) -> None:
        """Wait for all processes; `long`: it may take longer than `TIMEOUT`."""
        if self.size > 1:
            dist.barrier(group=self.patient if long else self.control)


@contextlib.contextmanager
def join_world(device: str = "auto") -> Iterator[World]:
    """Join the processes that `torchrun` started, or be the only one.

    Args:
        device: `auto` (CUDA where there is one, else CPU), `cpu`, `cuda`, or `cuda:N` with one process.

    Raises:
        UserError: the device does not exist, or `cuda:N` with several processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=find_device(device))
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    chosen = find_device(device, local_rank)
    store, rank, size = next(rendezvous("env://", rank, size, timeout=TIMEOUT))
    options = {"store": dist.PrefixStore("groups", store), "rank": rank, "world_size": size, "timeout": TIMEOUT}
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        dist.init_process_group("nccl", device_id=chosen, **options)
    else:
        dist.init_process_group("gloo", **options)
    control, patient = (dist.new_group(backend="gloo", timeout=timeout) for timeout in (TIMEOUT, LONG))
    world = World(rank, size, chosen, control, store, patient)
    try:
        yield world
    except BaseException as error:
        world.give_way(error)
        raise
    # Only after a good end: taking the group down waits for the peers, and after an error they may not come.
    dist.destroy_process_group()


def _exit_code(error: BaseException) -> int:
    """What the process will exit with when `error` ends it; never 0."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    code = getattr(error, "code", getattr(error, "exit_code", 2 if isinstance(error, ValueError) else 1))
    return code if isinstance(code, int) and code else 1


def find_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device of that name.

    Args:
        name: "auto" (CUDA where there is one, else the CPU), "cpu", "cuda", "cuda:1", ...
        local_rank: this process's number on its machine; None: there is one process.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown: give auto, cpu, cuda or cuda:N") from error
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"device {name!r}: this PyTorch sees no CUDA device")
    if local_rank is not None:
        if device.index is not None:
            raise UserError(f"device {name!r}: with several processes say cuda, each takes its own")
        device = torch.device("cuda", local_rank)
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {str(device)!r}: there are {torch.cuda.device_count()} CUDA devices on this machine")
    return device
