"""Several processes train one network on one batch: `torchrun --nproc-per-node N -m reidlib train …`.

All processes draw the same PK batch. Process r of N embeds the identities r, r + N, r + 2N … of it,
and takes their images as anchors a, against the images of all processes. With S_r the sum of the loss
over its triplets, and C how many triplets count in all processes, its loss is

    L_r = N · S_r / C,        so that  1/N · Σ_r ∂L_r/∂θ = ∂(Σ_r S_r / C)/∂θ

is the gradient of one process with the whole batch. An embedding takes part in the losses of all
processes, so the gathering of embeddings has a backward pass that sums its gradients over them.

What differs from one process is BatchNorm: on the CPU its batch statistics are those of a process's
own images. On CUDA, SyncBatchNorm takes them over all.
"""

import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reidlib.paths import cache_dir
from reidlib.training.losses import TripletLoss

T = TypeVar("T")
# For who waits in vain: of processes that die, torchrun and the connection tell at once.
TIMEOUT = timedelta(minutes=10)


def size() -> int:
    """Return how many processes train together."""
    return _of_group(dist.get_world_size, "WORLD_SIZE", 1) if dist.is_available() else 1


def rank() -> int:
    """Return which of them this process is, from 0. The first alone writes and speaks."""
    return _of_group(dist.get_rank, "RANK", 0) if dist.is_available() else 0


def _of_group(ask: Callable[[], int], variable: str, alone: int) -> int:
    if dist.is_initialized():
        return ask()
    return int(os.environ[variable]) if dist.is_torchelastic_launched() else alone


def is_second_start() -> bool:
    """Return whether torchrun has started this training again, after a process had died."""
    return size() > 1 and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun has started together with this one; alone, do nothing.

    Raises:
        RuntimeError: this process has lost the others.
    """
    if size() == 1 or dist.is_initialized():
        yield
        return
    here, cards = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if cards:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % cards)
    store, *who = next(dist.rendezvous("env://", timeout=TIMEOUT))
    if os.environ["GROUP_WORLD_SIZE"] == "1":  # machines may count otherwise
        # After a restart torchrun's store may still have the addresses of processes that are gone.
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    # NCCL takes one process a card; Gloo takes several.
    backend = "cpu:gloo,cuda:nccl" if cards >= here else "gloo"
    options = dict(zip(("rank", "world_size"), who, strict=True))
    dist.init_process_group(backend, store=store, timeout=TIMEOUT, **options)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and type(error) is not RuntimeError:
            raise
        cause = re.sub(r"^\[\S*\] |(?<=\w)\. .*", "", str(error).split("\n")[0])
        raise RuntimeError(
            f"{_name(rank())} fails or has lost the others ({cause}). Once all are there again, the run "
            "goes on from its last checkpoint."
        ) from error
    # Who fails stays connected to the end of the process: see `leave`.
    dist.destroy_process_group()


def _name(process: int) -> str:
    return f"Process {process} of {size()} (on {socket.gethostname()})"


@contextmanager
def in_turn() -> Iterator[None]:
    """Let one process of this machine after another do something: the first leaves it in the cache."""
    if size() == 1:
        yield
        return
    cache_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir() / ".turn"):
        yield


def together(work: Callable[[], T], *, by_first: bool = False) -> T:
    """Do something that may fail in one process alone: then all end, and the first says why.

    `by_first`: the first process does it, and all get what it returned.
    """
    if size() == 1:
        return work()
    done, failed = None, None
    try:
        done = None if by_first and rank() else work()
    except Exception as error:
        failed = error
    said = [None] * size()
    dist.all_gather_object(said, failed and (str(failed).strip() or type(failed).__name__))
    if any(said):
        if rank():
            leave()
        if failed:
            raise failed
        first = next(process for process, text in enumerate(said) if text)
        raise ValueError(f"{_name(first)} cannot begin, so none does: {said[first]}")
    if by_first:
        dist.broadcast_object_list(held := [done])
        return held[0]
    return done


def leave() -> NoReturn:
    """End a process beside the first with status 1, when that one has said why and is gone."""
    with suppress(RuntimeError):  # torchrun ends all processes where one has ended
        dist.all_reduce(torch.zeros(1))
    raise SystemExit(1)


def shares(p: int, k: int) -> list[Tensor]:
    """Return where in a PK batch the images of each process are: (P·K / N,) int64 each.

    Raises:
        ValueError: N does not divide P.
    """
    if p % size():
        able = [n for n in range(1, p + 1) if p % n == 0]
        raise ValueError(
            f"{size()} processes cannot share p = {p} identities evenly: take a multiple of {size()} "
            f"for p, or one of {', '.join(map(str, able))} processes."
        )
    # (P·K,) -> (P, K) -> (P·K / N,)
    return [torch.arange(p * k).view(p, k)[i :: size()].flatten() for i in range(size())]


def in_words(p: int, device: torch.device) -> str:
    """Say how several processes train; "" of one alone."""
    if size() == 1:
        return ""
    alone = "" if device.type == "cuda" else " BatchNorm takes its batch statistics in each alone."
    return f"{size()} processes train {p // size()} of the {p} identities of each batch.{alone}"


def align(model: nn.Module, device: torch.device) -> None:
    """Give the model of every process the numbers of the first one's, and on CUDA SyncBatchNorm."""
    if size() > 1:
        if device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place: the model itself is none
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def across(
    loss: Callable[..., TripletLoss], emb: Tensor, pids: Tensor, shares: Sequence[Tensor]
) -> TripletLoss:
    """Return the loss of a batch whose embeddings lie on all processes; all of them must call this.

    Values are those of one process with the whole batch, on every process. The gradients are such
    that their mean over processes is that of one process.

    Args:
        loss: takes embeddings, pids and `anchors`, as those in `LOSSES` do.
        emb: (b, D) embeddings of this process.
        pids: (B,) identities of the whole batch.
        shares: of each process, where in the batch its embeddings are, (b,) int64: every place once.
            Processes may have different numbers of them, and an identity may lie on several.
    """
    if size() == 1:
        return loss(emb, pids)
    shares = [share.to(emb.device) for share in shares]
    # In float32 at least, so that gradients are summed before they are rounded. (b, D) -> (B, D)
    whole = _Gather.apply(emb.to(torch.promote_types(emb.dtype, torch.float32)), shares)
    own = loss(whole, pids, anchors=shares[rank()])
    counts = [own.total.detach(), own.counted, own.triplets, own.active * own.triplets]
    sums = torch.stack([count.double() for count in counts])
    dist.all_reduce(sums)
    total, counted, triplets, active = sums
    counted = counted.clamp(min=1)
    return own._replace(
        loss=_with_value(own.total * size() / counted.to(own.total.dtype), total / counted),
        total=_with_value(own.total * size(), total),
        counted=sums[1].long(),
        per_anchor=_gathered(own.per_anchor, shares),
        triplets=triplets.long(),
        active=(active.round() / triplets.clamp(min=1)).to(own.active.dtype),
        # (b, B) -> (B, B): less than the gradients of a network, which travel, too
        distances=_gathered(own.distances, shares),
        anchors=torch.arange(len(pids), device=emb.device),
    )


def _with_value(graph: Tensor, value: Tensor) -> Tensor:
    """Return a number with the gradient of one and the value of another."""
    return graph + (value.to(graph.dtype) - graph).detach()


def _gathered(own: Tensor, shares: Sequence[Tensor]) -> Tensor:
    """(b, …) of each process -> (B, …), put where its share says."""
    longest, rest = max(map(len, shares)), own.shape[1:]
    padded = own.new_zeros(longest, *rest)  # collectives want one shape
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded)
    whole = own.new_empty(sum(map(len, shares)), *rest)
    for share, part in zip(shares, parts, strict=True):
        whole[share] = part[: len(share)]
    return whole


class _Gather(torch.autograd.Function):
    """`_gathered`, with the sum over all processes of what flows back to an embedding."""

    @staticmethod
    def forward(ctx, own, shares):
        ctx.share = shares[rank()]
        return _gathered(own, shares)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        # (B, D) -> (b, D)
        return gradient.index_select(0, ctx.share), None


def average(model: nn.Module) -> None:
    """Replace the gradients and the running statistics of BatchNorm by their means over processes.

    One sum in one order. DistributedDataParallel has the same mean, but sorts its buckets anew after
    its first step: from three processes on, a sum then rounds otherwise, and a run that was killed
    and goes on is not the same to the last bit.
    """
    if size() == 1:
        return
    tensors = [p.grad for p in model.parameters() if p.grad is not None]
    tensors += [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    means = (flat / size()).split([tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean.view_as(tensor))


def agreed(number: int) -> int:
    """Return the largest of a number that each process gives: 0 only where all give 0."""
    if size() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
