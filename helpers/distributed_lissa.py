"""LiSSA's independent runs shared out among processes of one machine, with a single all-reduce (Guo et al. 2021)."""

import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from .solvers import lissa


def sampled_ggn(model, train, task, batch_size=1):
    """sample_matvec(u, generator) for `lissa`: the Gauss-Newton matrix of a batch drawn with replacement, times u.

    train: one batch of all examples; u: [P] or [P, k] over the parameters that require gradients. The mean over the
    batch of Jᵀ H J u, with H as in `ggn`, by three reverse passes; every target must take a loss (no -100).
    """
    theta = [p for p in model.parameters() if p.requires_grad]
    n, sizes = len(train["labels"]), [p.numel() for p in theta]

    def product(u, generator):
        rows = torch.randint(n, (batch_size,), generator=generator)
        outputs, targets = task(model, {key: value[rows] for key, value in train.items()})
        zero = torch.zeros_like(outputs, requires_grad=True)
        back = torch.autograd.grad(outputs, theta, zero, create_graph=True)  # Jᵀ zero: linear, so its derivative is J
        parts = [part.reshape(-1, *p.shape) for part, p in zip(u.reshape(len(u), -1).T.split(sizes, 1), theta)]
        Ju = torch.autograd.grad(back, zero, parts, retain_graph=True, is_grads_batched=True)[0]
        if not targets.is_floating_point():
            p = outputs.detach().softmax(-1)
            Ju = p * (Ju - (p * Ju).sum(-1, keepdim=True))
        out = torch.autograd.grad(outputs, theta, Ju / batch_size, is_grads_batched=True)
        return torch.cat([part.flatten(1) for part in out], 1).T.reshape(u.shape)

    return product


def distributed_lissa(model, train, v, task, damping, scale, depth, repeats, batch_size=1, seed=0, processes=2,
                      timeout=300):  # fmt: skip
    """(x, seconds): x as `lissa` gives it on `sampled_ggn`, its `repeats` runs dealt out to `processes` processes.

    Run t has the seed seed + t wherever it is done, so x depends on `processes` by rounding only. seconds: from the
    moment when all are ready to the end of the all-reduce. Model and task must be importable by a fresh process, not
    defined in a notebook. Raises ValueError for fewer runs than processes, TimeoutError after `timeout` seconds, and
    ProcessRaisedException with the message of whichever process failed; no process and no file outlives the call.
    """
    if not 1 <= processes <= repeats:
        raise ValueError(f"processes={processes} with repeats={repeats}: give every process at least one run")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (damping, scale, depth, repeats, batch_size, seed, timeout)
        torch.save((model, train, v.detach(), task, arguments), Path(folder, "work.pt"))
        context = torch.multiprocessing.spawn(_worker, (processes, folder), processes, join=False)
        deadline = time.monotonic() + timeout
        try:
            while not context.join(timeout=max(0.1, deadline - time.monotonic())):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"timeout={timeout}: {processes} processes did not finish; give more seconds")
        finally:
            for process in context.processes:
                process.kill()
                process.join()
            for file in context.error_files:
                Path(file).unlink(missing_ok=True)
        return torch.load(Path(folder, "result.pt"))


def _worker(rank, processes, folder):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gloo's greetings would end up in a notebook
    torch.set_num_threads(1)
    model, train, v, task, arguments = torch.load(Path(folder, "work.pt"), weights_only=False)
    damping, scale, depth, repeats, batch_size, seed, timeout = arguments
    store = Path(folder, "store").as_uri()
    dist.init_process_group("gloo", store, timedelta(seconds=timeout), processes, rank)
    dist.barrier()
    start, total = time.perf_counter(), torch.zeros_like(v)
    sample_matvec = sampled_ggn(model, train, task, batch_size)
    for run in range(rank, repeats, processes):
        total += lissa(sample_matvec, v, damping, scale, depth, 1, seed + run).x
    dist.all_reduce(total)
    if rank == 0:
        torch.save((total / repeats, time.perf_counter() - start), Path(folder, "result.pt"))
    dist.destroy_process_group()
