"""Per-token gradients of every linear layer, one batch at a time: what the factors and the scores are both made of."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers.pytorch_utils import Conv1D

from .examples import TOKENWISE
from .head import head_gradient
from .kernels import fast_kernels
from .layers import capture, layer_shapes, precision
from .tasks import (
    IGNORED,
    asked,
    causal_lm,
    check_labels,
    draw_targets,
    embeddings_named,
    keyed_uniforms,
    read_by_model,
    summed_loss,
    targets_per_example,
)

PADS = 1e-4  # of Σ |ā| |Ds|: what pads may have by rounding


@dataclass(frozen=True)
class TokenGradients:
    """One batch. inputs: {layer: ā [B, T, d_in (+1)]}; outputs: {layer: Ds = ∂L/∂s [B, T, d_out]}; both 0 on pads.

    Both are float32 at least, so that what a model in half precision gives is multiplied and added up in float32. T is
    1 for a layer without a token axis. `real`: {layer: [B, T] bool or None where every position is real};
    `hidden`: ∂L/∂h at the rows with a target, kept to skip the output head in another pass, or None.
    """

    inputs: dict
    outputs: dict
    real: dict
    hidden: torch.Tensor | None = None


def token_gradients(model, batch, layers, task, seed=None, fast=(), hidden=None):
    """TokenGradients of the summed loss of `batch`; with a seed, of labels drawn from the model's own predictions.

    `fast`: what `fast_paths` found to hold; for the head, `hidden` of an earlier pass is used if at hand. The model
    must be `frozen`. Raises ValueError for a layer that the loss does not depend on.
    """
    kernels = fast_kernels(model) if "kernels" in fast else nullcontext()
    with torch.enable_grad(), kernels, capture(model, layers) as taken:
        if "head" in fast:
            top, upstream, hidden = _head_upstream(model, batch, seed, hidden)
        else:
            outputs, targets = asked(task, model, batch)
            if not bool(targets_per_example(targets).all()):
                raise ValueError("batches: an example has no target (all of its labels are -100): leave it out")
            check_labels(outputs, targets)
            if seed is not None:
                targets = draw_targets(outputs, targets, keyed_uniforms(batch, targets, seed))
            top, upstream = summed_loss(outputs, targets), None
        for name in layers:
            _check_taken(taken, name, batch)
        if not top.requires_grad:
            raise ValueError("task: its outputs depend on none of the layers, as if they were detached: return them as "
                             "the model gives them")
        gradients = torch.autograd.grad(top, [taken[name][2] for name in layers], upstream, allow_unused=True)
    read = {name: _one_layer(model, batch, name, taken[name][0], grad) for name, grad in zip(layers, gradients)}
    return TokenGradients(*({name: value[i] for name, value in read.items()} for i in range(3)), hidden)


def fastest_gradients(model, layers, task, batch=None):
    """gradients(batch, seed=None, hidden=None): `token_gradients` by the `fast_paths` of the first batch with its keys.

    Finding them can cost as much as a large batch. Who reads queries and stories makes one of these for both, and
    gives it a batch of stories, which show more than a short query: a window of attention, for one.
    """
    found = {} if batch is None else {frozenset(batch): fast_paths(model, batch, layers, task)}

    def gradients(batch, seed=None, hidden=None):
        keys = frozenset(batch)
        if keys not in found:
            found[keys] = fast_paths(model, batch, layers, task)
        return token_gradients(model, batch, layers, task, seed, found[keys], hidden)

    return gradients


def _head_upstream(model, batch, seed, hidden):
    """The last hidden state h [B, T, d], ∂L/∂h of the same shape, and its rows with a target [n, d]."""
    h = last_hidden(model, batch)
    targets = batch["labels"][:, 1:]
    rows = targets != IGNORED
    if hidden is None:
        uniforms = None if seed is None else keyed_uniforms(batch, targets, seed)[rows]
        hidden = head_gradient(h.detach()[:, :-1][rows], model.get_output_embeddings(), targets[rows], uniforms)
    upstream = torch.zeros_like(h)
    upstream[:, :-1][rows] = hidden
    return h, upstream, hidden


def _check_taken(taken, name, batch):
    if name not in taken:
        raise ValueError(f"layers: {name!r} was not called in the forward pass: leave it out of the pattern")
    a, version, _ = taken[name]
    examples = len(next(iter(batch.values())))
    if len(a) != examples and not _flattened(a, batch):
        raise ValueError(f"layers: {name!r} got an input of shape {tuple(a.shape)} for {examples} examples; its first "
                         "axis must be the example: leave it out of the pattern")
    if a._version != version:
        raise ValueError(f"layers: the input of {name!r} is changed in place after it, which hides what the layer saw: "
                         "make that operation out of place")


def _flattened(a, batch):
    """Whether a layer's input has one axis for examples and tokens, as OPT's feed-forward layers."""
    return a.dim() == 2 and "input_ids" in batch and len(a) == batch["input_ids"].numel() > len(batch["input_ids"])


def _one_layer(model, batch, name, a, grad):
    """(ā, Ds, real) of one layer, as [B, T, ·], with pads at 0 and the bias column of ones last."""
    if grad is None:
        raise ValueError(f"layers: the loss does not depend on {name!r}: leave it out of the pattern")
    if _flattened(a, batch):
        a, grad = (x.unflatten(0, batch["input_ids"].shape) for x in (a, grad))
    mask, tokens = batch.get("attention_mask"), a.dim() > 2
    a, grad = (x.flatten(1, -2) if tokens else x[:, None] for x in (a, grad))
    a, grad = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, grad))
    ids = batch.get("input_ids") if mask is None else mask
    if tokens and ids is not None and ids.dim() == 2 and ids.shape != a.shape[:2]:
        raise ValueError(f"layers: {name!r} sees {a.shape[1]} positions where the tokens are {tuple(ids.shape)}, "
                         "so that it cannot be told which is which: leave it out of the pattern")
    real = mask.bool() if tokens and mask is not None else None
    real = None if real is None or bool(real.all()) else real
    if model.get_submodule(name).bias is not None:
        a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2)
    elif real is not None:
        a = a.clone()  # it is the model's own
    if real is not None:
        pads = (~real).nonzero(as_tuple=True)  # few rows: masked_fill would go through all of them
        if bool(grad[pads].any()):
            size = lambda at: float((a[at].norm(dim=-1) * grad[at].norm(dim=-1)).sum())
            if size(pads) > PADS * size(...):
                raise ValueError(f"batches: the loss depends on what {name!r} gives at pads (attention_mask is 0): "
                                 "label them with -100, and let model and task use the mask")
            grad = grad.index_put(pads, grad.new_zeros(()))
        a[pads] = 0
    return a, grad, real


def fast_paths(model, batch, layers, task):
    """Which of "head" and "kernels" give, on two examples of `batch`, the Ds that autograd gives the general way.

    "head": the closed form for the output head; not for another task, a studied head, a model without
    `get_output_embeddings`, or where scaling, a soft-cap or anything else stands between the hidden state and the
    logits. "kernels": `fast_kernels`.
    """
    layer_shapes(model, layers)  # raises for what cannot be studied
    batch = {key: value[:2] for key, value in batch.items()}  # more would cost a pass where the vocabulary is large
    eps = torch.finfo(precision(model)).eps
    slow, rtol = token_gradients(model, batch, layers, task), min(1000 * eps, 0.05)
    _check_layers(model, batch, layers, task, slow, rtol, 10 * eps)
    slow = slow.outputs
    known = ["head"] * (task is causal_lm and _known_head(model, batch, layers)) + ["kernels"]
    for paths in (known, *([path] for path in known if len(known) > 1)):
        fast = token_gradients(model, batch, layers, task, fast=paths).outputs
        if all((slow[name] - fast[name]).norm() <= rtol * slow[name].norm() for name in layers):
            return paths
    return []


def _known_head(model, batch, layers):
    """Whether the logits may be a linear layer of `base_model`'s output, with all studied layers below that."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, torch.nn.Linear) or getattr(model, "base_model", model) is model:
        return False
    capped = getattr(getattr(model, "config", None), "final_logit_softcapping", None)
    if capped or not set(batch) <= set(TOKENWISE):  # what else a batch holds may change the logits
        return False
    below, h = set(model.base_model.modules()), last_hidden(model, batch)
    return (all(model.get_submodule(name) in below for name in layers)
            and h.shape[-1] == head.in_features and h.dtype == head.weight.dtype)


def _check_layers(model, batch, layers, task, got, rtol, rounding):
    """ValueError where Σ_t Ds_t ā_tᵀ is not autograd's gradient of a layer's weight: it computes something else.

    Within rtol of that gradient, and `rounding` of Σ_t |Ds_t| |ā_t|, for the terms may cancel.
    """
    weights = {name: model.get_submodule(name).weight for name in layers}
    weights = {name: weight for name, weight in weights.items()
               if isinstance(weight, torch.nn.Parameter) and weight.is_floating_point()}
    with torch.enable_grad():
        try:
            [weight.requires_grad_(True) for weight in weights.values()]
            found = torch.autograd.grad(summed_loss(*asked(task, model, batch)), list(weights.values()),
                                        allow_unused=True) if weights else ()
        finally:
            [weight.requires_grad_(False) for weight in weights.values()]
    for name, theirs in zip(weights, found):
        if theirs is None:
            continue
        a, ds = got.inputs[name].flatten(0, 1), got.outputs[name].flatten(0, 1)
        theirs = (theirs.T if isinstance(model.get_submodule(name), Conv1D) else theirs).to(a)
        apart, parts = (ds.T @ a[:, :theirs.shape[1]] - theirs).norm(), (a.norm(dim=1) * ds.norm(dim=1)).sum()
        if float(apart) > rtol * float(theirs.norm()) + rounding * float(parts):
            raise ValueError(f"layers: {name!r} ({type(model.get_submodule(name)).__name__}) is no plain x Wᵀ + b, or "
                             "its weight is used elsewhere too: autograd's gradient is another one; leave it out")


def last_hidden(model, batch):
    """What the head of a causal language model gets, [B, T, d]."""
    with embeddings_named(model, batch):
        return model.base_model(**read_by_model(batch), use_cache=False)[0]


def finite(value, name, rows):
    """`value`, or ValueError where it holds NaN or infinity, with the layer and the examples."""
    if not bool(value.isfinite().all()):
        raise ValueError(f"batches: NaN or infinite gradients in layer {name!r}, in the batch of examples "
                         f"{rows.tolist()} (numbered in the order given)")
    return value
