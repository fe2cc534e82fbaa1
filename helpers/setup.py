"""Before a long run on your own model: is it set up right (`check_setup`), and will it fit (`factor_bytes`)?"""

import math

import pandas as pd
import torch
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .ekfac import fit_ekfac
from .examples import check_targets
from .gradients import token_gradients
from .influence import influence
from .layers import frozen, layer_shapes, precision
from .tasks import IGNORED, asked, causal_lm, check_labels, summed_loss, targets_per_example

FEW = 4  # examples that are looked at
GUESS = 1.2  # times log(classes): a mean loss beyond it is no noise of a model that guesses
STEP = 1e-4  # of the query's loss, that the finite difference moves it by


def factor_bytes(model, layers):
    """Bytes of EKFACFactors by layer, a pandas Series with "all" last; nothing is computed and no data are needed.

    8 · (2 (d_in (+1))² + 2 d_out² + d_out · d_in (+1)) for A, Q_A, S, Q_S and Lambda in float64. The model may be on
    the meta device: `with torch.device("meta"): model = AutoModelForCausalLM.from_config(config)`. The fit takes up to
    2 × ekfac.KEEP_BYTES more, and what the model itself needs. Raises ValueError for layers that the model lacks.
    """
    shapes = layer_shapes(model, layers)
    size = {name: 8 * (2 * i * i + 2 * o * o + o * i) for name, (o, i) in shapes.items()}
    return pd.Series(size | {"all": sum(size.values())}, name="bytes")


def check_setup(model, batches, layers, task=causal_lm):
    """A DataFrame (check, passed, found, wanted, if it fails): five minutes' worth of doubts about a set-up.

    labels: the summed loss is the model's own mean loss times its number of targets (None where the model gives no
    loss), and for causal_lm the labels are the tokens themselves; guess: for causal_lm, the mean loss of a target is
    not beyond that of a blind guess (the tokens of another tokenizer, a model without weights); one by one: the loss of
    an example (the worst one's is shown) does not depend on the others in its batch; pads: without its pads, and with
    three more, an example has the same loss, and no position at an end is attended to without a target; gradient: Σ_t
    Ds_t ā_tᵀ is autograd's gradient of every layer's weight and bias; sign and size: the step θ ± η P(∇L_m) along the
    first example's preconditioned gradient changes its loss by ∓ η I(m, m). These three are None where weights are
    quantised, the last two also in half precision, which loses so small a step. The first examples of the first batch
    are used, so it takes little more than the eigenvectors of the layers: seconds for a small model, minutes for all
    MLP layers of GPT-2, where those of one block will do. The model comes back as it was. Raises ValueError for layers
    that the model lacks and for bad batches, IndexError for tokens or labels that the model does not know; what else
    fit_ekfac would refuse stands under gradient.
    """
    check_targets(batches, task, "batches")
    layer_shapes(model, layers)
    batch = {key: value[:FEW] for key, value in batches[0].items()}
    rtol = {torch.float64: 1e-6, torch.float32: 1e-3}.get(precision(model), 1e-2)  # bfloat16 and the like
    with frozen(model):
        _loss(model, batch, task)  # raises what has a name, before the model is asked itself
        rows = [check(model, batch, task, rtol) for check in (_labels, _guess, _one_by_one, _pads)]
        quantised = [name for name in layers if not model.get_submodule(name).weight.is_floating_point()]
        try:
            rows += [(what, None, f"the weights of {quantised[0]!r} are quantised", "", "load it as it was trained")
                     for what in ("gradient", "sign", "size")] if quantised else [
                _gradient(model, batch, layers, task, rtol), *_step(model, batch, layers, task)]
        except ValueError as error:
            rows.append(("gradient", False, str(error), "", "fit_ekfac and influence refuse it"))
    return pd.DataFrame(rows, columns=["check", "passed", "found", "wanted", "if it fails"])


def _loss(model, batch, task):
    with torch.no_grad():
        outputs, targets = asked(task, model, batch)
        check_labels(outputs, targets)
        return float(summed_loss(outputs, targets).double())


def _close(x, y, rtol):
    return abs(x - y) <= rtol * max(abs(x), abs(y), 1e-30)


def _labels(model, batch, task, rtol):
    told = "the task shifts labels that the model shifts already (or none does), or counts pads as targets"
    level = logging.get_verbosity()
    try:
        logging.set_verbosity_error()  # a model made from a configuration warns that it takes the usual loss
        with torch.no_grad():
            mean = model(**batch).loss
    except (TypeError, AttributeError):  # no model of transformers
        mean = None
    finally:
        logging.set_verbosity(level)
    if task is causal_lm:
        wrong = (batch["labels"] != IGNORED) & (batch["labels"] != batch["input_ids"])
        if bool(wrong.any()):
            return ("labels", False, f"{int(wrong.sum())} labels are not the token at their position", 0,
                    "labels are the input_ids themselves, unshifted: causal_lm shifts")
    targets = asked(task, model, batch)[1]
    if mean is None or targets.is_floating_point():
        return "labels", None, "the model gives no loss of its own, or one of another unit", "", told
    found, n = _loss(model, batch, task), int(targets_per_example(targets).sum())
    return "labels", _close(found, float(mean) * n, rtol), found, float(mean) * n, told


def _guess(model, batch, task, rtol):
    told = "it does worse than a blind guess: are these its tokenizer's ids, and its weights?"
    if task is not causal_lm:
        return "guess", None, "no language model", "", told
    outputs, targets = asked(task, model, batch)
    found, blind = _loss(model, batch, task) / int((targets != IGNORED).sum()), math.log(outputs.shape[-1])
    return "guess", found <= GUESS * blind, found, f"below {blind:.2f}", told


def _one_by_one(model, batch, task, rtol):
    with torch.no_grad():
        rows = zip(*asked(task, model, batch))  # (outputs, targets) of every example
        together = [float(summed_loss(outputs[None], targets[None]).double()) for outputs, targets in rows]
    alone = [_loss(model, {key: value[n:n + 1] for key, value in batch.items()}, task) for n in range(len(together))]
    found, wanted = max(zip(together, alone), key=lambda pair: abs(pair[0] - pair[1]))  # of the worst example
    passed = abs(found - wanted) <= rtol * max(sum(alone) / len(alone), 1e-30)
    return ("one by one", passed, found, wanted,
            "something mixes examples (batch normalisation, a mean over the batch in the task, dropout left on)")


def _pads(model, batch, task, rtol):
    told = "give attention_mask = 0 and label -100 to every pad; the model must use the mask"
    ids, mask, labels = (batch.get(name) for name in ("input_ids", "attention_mask", "labels"))
    if ids is None or labels is None or labels.shape != ids.shape:
        return "pads", None, "no labels along a token axis", "", told
    if mask is None:
        runs = (ids == ids[:, -1:]).flip(1).long().cumprod(1).sum(1)  # how often the last id stands at the end
        if int(runs.max()) > 2:
            return "pads", False, f"no attention_mask, and {int(runs.max())} times the same id at an end", 0, told
        mask = torch.ones_like(ids)
    last = (labels != -100).long().cumsum(1).argmax(1)  # the last target of every example
    behind = ((torch.arange(mask.shape[1], device=mask.device) > last[:, None]) & mask.bool()).sum(1)
    if int(behind.max()) > min(int(behind.min()), 1):  # one in every example is an end token behind a completion
        return "pads", False, f"{int(behind.sum())} positions behind the last target are attended to", 0, told
    if "attention_mask" not in batch:
        return "pads", None, "no attention_mask: every position counts", "", told
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    pad = lambda key, value: torch.nn.functional.pad(value, (0, 3), value=fill.get(key, 0))
    longer = {key: pad(key, value) if value.shape == mask.shape else value for key, value in batch.items()}
    bare = [{key: value[n:n + 1, mask[n].bool()] if value.shape == mask.shape else value[n:n + 1]
             for key, value in batch.items()} for n in range(len(mask))]
    found, wanted = _loss(model, longer, task), sum(_loss(model, one, task) for one in bare)
    if not mask[:, 0].all():
        told = "the model counts positions from the pads on the left: pad on the right, or give position_ids; " + told
    return "pads", _close(found, wanted, rtol), found, wanted, told


def _gradient(model, batch, layers, task, rtol):
    got, worst, name = token_gradients(model, batch, layers, task), -1.0, ""
    modules = [model.get_submodule(layer) for layer in layers]
    weights = [[module.weight, *([] if module.bias is None else [module.bias])] for module in modules]
    with torch.enable_grad():
        [p.requires_grad_(True) for part in weights for p in part]
        loss = summed_loss(*asked(task, model, batch))
        found = iter(torch.autograd.grad(loss, [p for part in weights for p in part]))
        [p.requires_grad_(False) for part in weights for p in part]
    for layer, part in zip(layers, weights):
        ours = (got.outputs[layer].transpose(1, 2) @ got.inputs[layer]).sum(0)
        parts = [next(found) for _ in part]
        turned = parts[0].T if isinstance(model.get_submodule(layer), Conv1D) else parts[0]
        theirs = torch.cat([turned, *(bias[:, None] for bias in parts[1:])], 1)
        error = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
        worst, name = max((worst, name), (error, layer))
    return ("gradient", worst <= rtol, f"relative error {worst:.1e} ({name})", 0,
            "the layer is used in a way that its hooks do not see (called twice, tied, changed in place): leave it out")


def _step(model, batch, layers, task):
    one = {key: value[:1] for key, value in batch.items()}
    factors = fit_ekfac(model, [batch], layers, task, progress=False)
    score, dtype = float(influence(model, factors, [one], [one], task, progress=False)), precision(model)
    told = ("a step along P(∇L) raises the loss: a sign is wrong, or there is no gradient",
            "the loss moves by another amount than −η I: parts of the gradient are missing, or the model is random")
    if dtype.itemsize < 4:
        lost = f"a small step is lost in {str(dtype)[6:]}: load the model in float32 to check it"
        return [("sign", None, lost, "", told[0]), ("size", None, lost, "", told[1])]
    if not score > 0:
        return [("sign", False, f"I(m, m) = {score:g}", "above 0", told[0]), ("size", None, "", "", told[1])]
    got, loss = token_gradients(model, one, layers, task), _loss(model, one, task)
    step = factors.ihvp({layer: (got.outputs[layer].transpose(1, 2) @ got.inputs[layer])[0] for layer in layers})
    eta, moved = STEP * loss / score, []
    for sign in (-1, 1):
        kept = {p: p.detach().clone() for layer in layers for p in model.get_submodule(layer).parameters()}
        try:
            for layer in layers:
                _move(model.get_submodule(layer), sign * eta * step[layer])
            moved.append(_loss(model, one, task))
        finally:
            [p.data.copy_(value) for p, value in kept.items()]
    found, wanted = (moved[0] - moved[1]) / 2, -eta * score
    return [("sign", found < 0, found, "below 0", told[0]),
            ("size", abs(found - wanted) <= 0.02 * abs(wanted), found, wanted, told[1])]


def _move(module, step):
    weight = step[:, : step.shape[1] - (module.bias is not None)]
    module.weight.data.add_((weight.T if isinstance(module, Conv1D) else weight).to(module.weight))
    if module.bias is not None:
        module.bias.data.add_(step[:, -1].to(module.bias))
