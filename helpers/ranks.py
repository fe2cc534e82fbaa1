"""The few things that processes tell one another where a job runs under torchrun (torch.distributed).

    torchrun --standalone --nproc-per-node 2 -m helpers fit --out out/job         # one machine
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m helpers fit ...

Every rank holds the whole model and one contiguous share of the stories (`split_dataset_by_node`). A fit speaks three
times: one all-reduce of the sums for A and S, one broadcast of every layer's eigenvectors from the rank that computed
them, one all-reduce of the sums for Lambda: for a layer, all in float64, 8 (d_in² + d_out²), the same again, and
8 d_in d_out bytes, d_in with its bias. Nothing depends on the number of stories. Scores travel once, from the rank that
computed them to rank 0, which writes them. Both passes and the eigenvectors fall with the number of ranks; loading the
model, the communication, and the rank with the longest stories do not. Backend: gloo, and nccl for tensors on a GPU.

A rank that dies takes the job down: torchrun ends the others. The same command, with the same number of ranks, goes on
from the checkpoint of every rank; these need not be on one disk, but a rank has to find its own again.
"""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=2)  # after a restart one rank may wait for the whole pass of another; a dead one is noticed


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def size():
    """How many processes share the job; 1 where torch.distributed is not at work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def process_group():
    """Inside, the processes that torchrun started can speak to one another; without torchrun there is just this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def add_up(flat):
    """Replaces `flat` by its sum over the ranks."""
    if size() > 1:
        dist.all_reduce(flat)


def eigenvectors(matrices):
    """{layer: eigenvectors in columns} of symmetric matrices, the layers dealt out to the ranks, the same on all."""
    Q = {name: torch.linalg.eigh(matrix)[1].contiguous() if number % size() == rank() else torch.empty_like(matrix)
         for number, (name, matrix) in enumerate(matrices.items())}
    if size() > 1:
        for number, value in enumerate(Q.values()):
            dist.broadcast(value, number % size())
    return Q


def collected(value):
    """[value of rank 0, of rank 1, ...] on every rank; small things only."""
    out = [value] * size()
    if size() > 1:
        dist.all_gather_object(out, value)
    return out


def gathered(value):
    """[value of rank 0, of rank 1, ...] on rank 0, and None elsewhere."""
    out = [value] * size() if rank() == 0 else None
    if size() > 1:
        dist.gather_object(value, out)
    return out


def from_first(function):
    """function() of rank 0, on every rank; where it raises ValueError or OSError, every rank does."""
    answer = [None, None]
    if rank() == 0:
        try:
            answer[0] = function()
        except (ValueError, OSError) as error:
            answer[1] = error
    if size() > 1:
        dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
