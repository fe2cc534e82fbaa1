"""Batches as they are given: checked, digested, and regrouped by length."""

from collections.abc import Mapping

import torch

from .tasks import IGNORED, causal_lm

TOKENWISE = ("input_ids", "attention_mask", "labels", "position_ids", "token_type_ids")  # what is cut with the pads


def check_targets(batches, task, argument, digest=None):
    """(examples, widest `input_ids`); `digest`, a hashlib object if given, is updated with everything in the batches.

    Raises ValueError where `batches` is no sequence of dicts of tensors that begin with one axis of examples, for none
    and an empty one, and, for causal_lm, for labels that are missing or belong to pads, and for an example that takes
    no loss (which batch, which row).
    """
    if not callable(task):
        raise TypeError(f"task must be a function (model, batch) -> (outputs, targets), got {task!r:.60}")
    if isinstance(batches, Mapping) or not (hasattr(batches, "__getitem__") and hasattr(batches, "__len__")):
        raise ValueError(f"{argument}: got {type(batches).__name__}; give a list of batches, as list(loader) makes one "
                         "of a loader that does not shuffle")
    if not len(batches):
        raise ValueError(f"{argument}: got no batches; tokenize(texts, tokenizer) makes them")
    examples, width, keys = 0, 0, set()
    for number, batch in enumerate(batches):
        examples += _size(batch, f"{argument}: batch {number}")
        keys = keys or set(batch)
        if set(batch) != keys:
            raise ValueError(f"{argument}: batch {number} holds {sorted(batch)} and batch 0 {sorted(keys)}; all must "
                             "hold the same")
        width = max(width, batch["input_ids"].shape[-1] if "input_ids" in batch else 0)
        if digest is not None:
            digest_tensors(batch, digest)
        if task is causal_lm:
            _check_labels(batch, f"{argument}: batch {number}")
    return examples, width


def _size(batch, what):
    """The number of examples of one batch."""
    if not isinstance(batch, Mapping) or not batch:
        raise ValueError(f"{what} is {batch!r:.60}; a batch is a dict of tensors with a leading axis of examples")
    for key, value in batch.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{what}, {key!r} is {type(value).__name__}; a batch is a dict of tensors: leave it out")
    sizes = {key: len(value) if value.dim() else None for key, value in batch.items()}
    if len(set(sizes.values())) != 1 or None in sizes.values():
        raise ValueError(f"{what} has tensors of {sizes} examples; all must begin with the same axis of examples")
    size = next(iter(sizes.values()))
    if not size:
        raise ValueError(f"{what} has no examples; leave it out")
    return size


def _check_labels(batch, what):
    """ValueError where a causal language model's labels are missing, lie on or beside a pad, or are all -100."""
    if "input_ids" not in batch:
        raise ValueError(f"{what} has {', '.join(map(repr, batch))}; causal_lm reads input_ids, "
                         "attention_mask and labels: another input needs a task of its own")
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    for name in ("input_ids", "attention_mask"):
        if batch.get(name) is not None and (batch[name].dim() != 2 or batch[name].shape != batch["input_ids"].shape):
            raise ValueError(f"{what}: {name} must be [examples, tokens], got {tuple(batch[name].shape)}")
    for name, value in (("input_ids", batch["input_ids"]), ("labels", labels)):
        if value is not None and (value.is_floating_point() or value.dtype is torch.bool):
            raise ValueError(f"{what}: {name} must be integers, got {value.dtype}")
    if labels is None or labels.shape != batch["input_ids"].shape:
        raise ValueError(f"{what}: labels must have the shape {tuple(batch['input_ids'].shape)} of input_ids, got "
                         f"{None if labels is None else tuple(labels.shape)}: the ids, unshifted, -100 at pads")
    taken = labels[:, 1:] != IGNORED
    lost = None if mask is None else taken & ~(mask[:, 1:].bool() & mask[:, :-1].bool())
    if lost is not None and bool(lost.any()):
        row, at = lost.nonzero()[0].tolist()
        raise ValueError(f"{what}, row {row} has a label at position {at + 1}, which is a pad or would be predicted "
                         "from one: label pads with -100 and, where they are on the left, the first token too")
    if not bool(taken.any(1).all()):
        row = int(taken.any(1).logical_not().nonzero()[0])
        raise ValueError(f"{what}, row {row} has no target (every label after the first is "
                         "-100): give at least two tokens, the last of them labelled")


def digest_tensors(tensors, digest):
    """Updates a hashlib object with the names, shapes, dtypes and bytes of {name: tensor}."""
    for name, value in tensors.items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def by_length(batches):
    """[(rows [B], batch)]: the examples regrouped by length, pads trimmed, in batches of no more examples and no more
    tokens than the largest has.

    `rows` index the examples in their given order. Only language-model batches (2-D `input_ids` and `attention_mask`)
    are regrouped, with the pads they came with (a classifier may look for its pad id). Others, batches without any pad,
    and those that hold something unknown of the shape of `input_ids` come back as they are. Left padding stays, since
    positions may count it.
    """
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    text = all({"input_ids", "attention_mask"} <= set(batch) and batch["input_ids"].dim() == 2
               and not any(_along_tokens(key, batch) for key in set(batch) - set(TOKENWISE)) for batch in batches)
    padded = next((batch for batch in batches if not batch["attention_mask"].all()), None) if text else None
    if padded is None:
        return list(zip(torch.arange(sum(sizes)).split(sizes), batches))
    at = tuple(padded["attention_mask"].eq(0).nonzero()[0])
    pads = {key: padded[key][at] for key in padded if all(_along_tokens(key, batch) for batch in batches)}
    pads |= {"labels": torch.full_like(pads["labels"], IGNORED)} if "labels" in pads else {}
    examples = [(batch, row) for batch, size in zip(batches, sizes) for row in range(size)]
    lengths = [length for batch in batches for length in _lengths(batch["attention_mask"]).tolist()]
    room, groups = max(batch["input_ids"].numel() for batch in batches), [[]]
    for i in sorted(range(len(examples)), key=lambda i: lengths[i]):  # the newest of a group is its longest
        if len(groups[-1]) == max(sizes) or (len(groups[-1]) + 1) * lengths[i] > max(room, lengths[i]):
            groups.append([])
        groups[-1].append(i)
    return [(torch.tensor(group), _gather([examples[i] for i in group], lengths[group[-1]], pads)) for group in groups]


def _along_tokens(key, batch):
    """Whether a tensor has an axis of the input's tokens; a regression's targets, as many by chance, have none."""
    floats = key == "labels" and batch[key].is_floating_point()
    return batch[key].shape[:2] == batch["input_ids"].shape and not floats


def _lengths(mask):
    """Columns up to the last real one, [B]."""
    return (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)


def _gather(examples, length, pads):
    """One batch of the given (batch, row) pairs: the token axes, those in `pads`, cut or padded on the right."""
    out = {}
    for key in examples[0][0]:
        values = []
        for batch, row in examples:
            value = batch[key][row]
            if key in pads:
                value = torch.cat([value[:length], pads[key].expand(length - len(value[:length]), *pads[key].shape)])
            values.append(value)
        out[key] = torch.stack(values)
    return out
