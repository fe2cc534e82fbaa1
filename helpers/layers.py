"""Which layers are studied, and how their inputs and output gradients are read off a model."""

import re
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from transformers.pytorch_utils import Conv1D


def linear_layers(model, pattern):
    """Names of the `nn.Linear` and GPT-2 `Conv1D` modules of `model` that `re.search(pattern, name)` finds, in order.

    Raises ValueError for a pattern that is no regular expression or matches nothing (the names there are, are listed),
    and where a matched module shares its weight with another one (a tied output head: its gradient would be half of
    the truth). What a pattern should leave out: r"^(?!lm_head)" is all but the head.
    """
    check_model(model)
    if not isinstance(pattern, str):
        raise TypeError(f"layers: the pattern is a {type(pattern).__name__}; give one regular expression, such as "
                        r"r'mlp|attn'")
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"layers: pattern {pattern!r} is no regular expression ({error})") from error
    linear = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    found = [name for name in linear if wanted.search(name)]
    if not found:
        names = ", ".join(linear) or "none"
        raise ValueError(f"layers matched nothing for pattern {pattern!r} in {type(model).__name__}; "
                         f"linear layers are {names}")
    for name in found:
        check_layer(model, name)
    return found


def check_model(model):
    """TypeError for anything but a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}"
                        + ": give its .model" * hasattr(model, "model"))


def precision(model):
    """The dtype of the model's first floating parameter; quantised ones are passed over."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def check_layer(model, name):
    """The module called `name`; raises ValueError where it is missing, not linear, or shares its weight."""
    if any(getattr(getattr(module, "config", None), "is_encoder_decoder", False) for module in model.modules()):
        raise ValueError(f"model: {type(model).__name__} has an encoder and a decoder, whose tokens need two masks; "
                         "the helpers take models with one token axis")
    modules = dict(model.named_modules())
    module = modules.get(name)
    if not isinstance(module, (nn.Linear, Conv1D)):
        kind = "no such module" if module is None else type(module).__name__
        kind = f"{type(module).__module__}.{kind}" if kind == "Linear" else kind  # a quantised one, for instance
        raise ValueError(f"layers: {name!r} is {kind} in {type(model).__name__}; "
                         "EK-FAC takes nn.Linear and Conv1D: choose with linear_layers(model, pattern)")
    shared = [other for other, m in modules.items() if m is not module and getattr(m, "weight", None) is module.weight]
    if shared:
        raise ValueError(f"layers: {name!r} shares its weight with {shared[0]!r}; its gradient has a part that a "
                         f"linear layer's hooks do not see: leave it out of the pattern, as r'^(?!{name}$)' does")
    return module


def layer_shapes(model, layers):
    """{layer: (d_out, d_in + 1 if it has a bias else d_in)}; raises ValueError for no layers, or one string."""
    check_model(model)
    if not isinstance(layers, (list, tuple)) or not layers:
        raise ValueError(f"layers must be a list of names, got {layers!r}: linear_layers(model, pattern) makes one")
    twice = [name for name in layers if list(layers).count(name) > 1]
    if twice:
        raise ValueError(f"layers: {twice[0]!r} is named twice")
    shapes = {}
    for name in layers:
        module = check_layer(model, name)
        d_in, d_out = module.weight.shape if isinstance(module, Conv1D) else (module.in_features, module.out_features)
        shapes[name] = (d_out, d_in + (module.bias is not None))
    return shapes


@contextmanager
def frozen(model):
    """Evaluation mode, no parameter gradients, no autocast and no inference mode inside; the model comes back as it
    was, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    wants = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in wants:
            parameter.requires_grad_(False)
        device = wants[0][0].device.type if wants else "cpu"
        with torch.inference_mode(False), torch.autocast(device, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, wanted in wants:
            parameter.requires_grad_(wanted)


@contextmanager
def capture(model, layers):
    """Inside, a forward pass of the (frozen) model fills the dictionary given: {layer: (input a, its version, edge)}.

    `edge` stands for the layer's output in `torch.autograd.grad`, as it was when the layer gave it, whatever changes it
    in place afterwards. The first outputs start the graph, so nothing below them is differentiated and no weight
    gradient is formed. A layer that one forward pass calls twice is refused: its gradient is a sum that one pair cannot
    hold.
    """
    taken, handles, fused = {}, [], torch.backends.mha.get_fastpath_enabled()

    def hook(name):
        def read(module, inputs, named, output):
            if name in taken:
                raise ValueError(f"layers: {name!r} is called twice in one forward pass; EK-FAC needs one call: "
                                 "leave it out of the pattern")
            if not torch.is_grad_enabled():
                raise ValueError(f"layers: {name!r} runs without gradients, in a part of the model under no_grad: "
                                 "leave it out of the pattern")
            if not torch.is_tensor(output):
                raise ValueError(f"layers: {name!r} gives a {type(output).__name__} and no tensor: leave it out of the "
                                 "pattern")
            start = not output.requires_grad
            a = inputs[0] if inputs else next(iter(named.values()))
            taken[name] = (a.detach(), a._version, get_gradient_edge(output.requires_grad_()))
            return output.clone() if start else None  # autograd lets no leaf be changed in place
        return read

    try:
        torch.backends.mha.set_fastpath_enabled(False)  # nn.TransformerEncoder's, which calls no layer
        for name in layers:  # first of all hooks: what the layer gave, before another one changes it
            module = model.get_submodule(name)
            handles.append(module.register_forward_hook(hook(name), prepend=True, with_kwargs=True))
        yield taken
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()
