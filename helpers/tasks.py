"""What a model is asked: its outputs, its targets, its loss, and labels drawn from its own predictions.

A task is a function `(model, batch) -> (outputs [batch, ..., C], targets [batch, ...])`. Integer targets are
categorical and -100 is ignored; floating targets [batch, ..., C] are Gaussian with unit variance.
"""

import hashlib
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

IGNORED = -100
CHUNK = 4_000_000  # outputs whose distribution function is held at a time


def causal_lm(model, batch):
    """Next-token prediction: logits [B, T-1, V] at positions 0..T-2 and the labels [B, T-1] of positions 1..T-1."""
    return model(**read_by_model(batch), use_cache=False).logits[:, :-1], batch["labels"][:, 1:]


def classification(model, batch):
    """One label an example: logits [B, C] of `model(**inputs)` and integer labels [B]; ValueError for floating ones."""
    if batch["labels"].is_floating_point():
        raise ValueError(f"labels: classification takes integer classes, got {batch['labels'].dtype}; for floating "
                         "targets with the loss ½‖y − f‖² take regression")
    return _outputs(model, batch), batch["labels"]


def regression(model, batch):
    """Gaussian targets: outputs [B, C] of `model(**inputs)` and floating labels [B, C] (or [B] where C is 1)."""
    outputs = _outputs(model, batch)
    return outputs, batch["labels"].to(outputs.dtype).reshape(outputs.shape)


def _outputs(model, batch):
    out = model(**read_by_model(batch))
    return getattr(out, "logits", out)


def read_by_model(batch):
    """What a Hugging Face model is given of a batch: everything but the labels."""
    return {key: value for key, value in batch.items() if key != "labels"}


@contextmanager
def embeddings_named(model, batch):
    """An IndexError that tells what was looked up, where the model has no embedding for a token or a position."""
    try:
        yield
    except IndexError as error:
        ids, config = batch.get("input_ids"), getattr(model, "config", None)
        if ids is None or ids.is_floating_point() or "index out of range" not in str(error):
            raise
        known = [getattr(config, name, "?") for name in ("vocab_size", "max_position_embeddings")]
        raise IndexError(f"batches: {ids.shape[-1]} positions with token ids {int(ids.min())} to {int(ids.max())}, but "
                         f"the model has embeddings for {known[1]} positions and {known[0]} tokens: take its own "
                         "tokenizer, and max_length no longer than it reads") from error


def asked(task, model, batch):
    """(outputs, targets) of `task`; raises ValueError where it returns anything else, or shapes that do not match, and
    IndexError for a token or a position that the model does not know."""
    with embeddings_named(model, batch):
        given, n = task(model, batch), len(next(iter(batch.values())))
    if not (isinstance(given, tuple) and len(given) == 2 and all(isinstance(x, torch.Tensor) for x in given)):
        kind = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, torch.Tensor) else type(given).__name__
        kind = f"({', '.join(type(part).__name__ for part in given)})" if isinstance(given, tuple) else kind
        raise ValueError(f"task: it returned {kind}; it must return (outputs [..., C], targets [...]), of which "
                         "the loss is formed here: cross-entropy for integers, ½‖y − f‖² for floats")
    outputs, targets = given
    wanted = outputs.shape if targets.is_floating_point() else outputs.shape[:-1]
    if targets.shape != wanted or outputs.dim() < 2 or len(outputs) != n:
        raise ValueError(f"task: outputs {tuple(outputs.shape)} and {targets.dtype} targets {tuple(targets.shape)} do "
                         f"not match for {n} examples: outputs are [examples, ..., C], integer targets lack the last "
                         "axis, floating ones have the same shape")
    return outputs, targets


def summed_loss(outputs, targets):
    """Loss summed over examples and unmasked targets, in nats: cross-entropy, or ½‖y − f‖² for floating targets.

    Outputs in half precision are summed in float32.
    """
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if targets.is_floating_point():
        return 0.5 * (targets - outputs).square().sum()
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten().long(), ignore_index=IGNORED, reduction="sum")


def targets_per_example(targets):
    """How many losses each example takes, [B]."""
    taken = torch.ones_like(targets) if targets.is_floating_point() else targets.ne(IGNORED)
    return taken.flatten(1).sum(1) if taken.dim() > 1 else taken.long()


def draw_targets(outputs, targets, uniforms):
    """Labels from the model's own predictive distribution (the true Fisher; Kunstner et al. 2019, section 2).

    outputs [..., C]; targets [...] or, floating, [..., C]; uniforms of targets' shape, in (0, 1). One draw a target;
    -100 stays -100. Categorical draws invert the distribution function, Gaussian ones the normal's.
    """
    if targets.is_floating_point():
        return outputs.detach() + torch.special.ndtri(uniforms).to(outputs.dtype)
    check_labels(outputs, targets)
    rows = max(1, CHUNK // outputs.shape[-1])
    parts = zip(outputs.detach().flatten(0, -2).split(rows), uniforms.flatten().split(rows))
    drawn = torch.cat([_inverse(part.double().softmax(-1).cumsum(-1), u) for part, u in parts]).view(targets.shape)
    return torch.where(targets == IGNORED, targets, drawn)


def _inverse(cdf, uniforms):
    """The first class [n] at which the distribution function [n, C] reaches the uniforms [n]."""
    return (cdf < uniforms[:, None] * cdf[:, -1:]).sum(-1).clamp_(max=cdf.shape[-1] - 1)


def check_labels(outputs, targets):
    """As `check_classes`, for the integer targets [...] of outputs [..., C] that take a loss."""
    if not targets.is_floating_point():
        check_classes(targets[targets != IGNORED], outputs.shape[-1])


def check_classes(targets, classes):
    """IndexError for a label outside 0 … classes − 1; a negative one would count from the end where it is an index."""
    wrong = targets[(targets < 0) | (targets >= classes)]
    if len(wrong):
        raise IndexError(f"labels: {int(wrong[0])} is out of the classes 0 to {classes - 1}; {IGNORED} marks what "
                         "takes no loss")


def keyed_uniforms(batch, targets, seed):
    """Uniforms in (0, 1), float64, of targets' shape, keyed by (seed, unpadded inputs of the example, position).

    Neither padding nor the order or size of batches changes them. The key is a BLAKE2b digest, the stream SplitMix64
    (Steele et al. 2014).
    """
    keys = np.array([_key(batch, row, seed) for row in range(len(targets))], dtype=np.uint64)
    flat = targets.reshape(len(targets), -1)
    steps = _positions(batch, targets)
    counter = keys[:, None] + (steps + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (counter ^ (counter >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(31))) >> np.uint64(11)
    return torch.from_numpy((z + 0.5) / 2.0**53).reshape(len(targets), *targets.shape[1:]).to(flat.device)


def _key(batch, row, seed):
    """64 bits from the seed and everything the model reads of one example; pads are left out."""
    mask = batch.get("attention_mask")
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8)
    for name in sorted(set(batch) - {"labels", "attention_mask"}):
        value = batch[name][row]
        if mask is not None and value.shape[:1] == mask.shape[1:]:
            value = value[mask[row].bool()]
        value = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(name.encode() + value.numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")


def _positions(batch, targets):
    """Index of every target within its example, as uint64 [B, targets an example]; of tokens the real ones count, from
    1, with or without a mask."""
    per_step = targets[0].numel() // targets.shape[1] if targets.dim() > 1 else 1
    steps = torch.arange(targets[0].numel() // per_step, device="cpu").expand(len(targets), -1)
    mask = batch.get("attention_mask")
    tokens = targets.dim() > 1 + targets.is_floating_point()  # a regression's [B, C] has no token axis
    if tokens:
        masked = mask is not None and 0 <= mask.shape[1] - targets.shape[1] <= 1
        steps = mask.cpu().long().cumsum(1)[:, : targets.shape[1]] if masked else steps + 1
    inner = torch.arange(per_step, device="cpu")
    return (steps[..., None] * per_step + inner).flatten(1).numpy().astype(np.uint64)
