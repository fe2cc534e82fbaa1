"""Attention in blocks against attention written out; every kind of model's own kernels against ours."""

import time

import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification, GPTNeoConfig, GPTNeoForCausalLM

from helpers import causal_lm, classification, kernels, linear_layers
from helpers.gradients import fast_paths, token_gradients
from helpers.layers import frozen


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """`attend` is taken wherever it can be, whether or not it pays on this machine."""
    monkeypatch.setattr(kernels, "blocks_pay", lambda width, threads: True)


def written_out(query, key, value, seen, scale, added=0.0):
    weights = (query @ key.transpose(2, 3) * scale + added).masked_fill(~seen, -torch.inf).softmax(-1)
    return weights @ value


def masks(T, S, B=3):
    """{name: [B or 1, 1, T, S] bool}; the last query reads the last key."""
    causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    right = causal.expand(B, 1, T, S).clone()
    right[1, ..., max(1, S - 4):] = False
    holes = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(0)) < 0.5
    return {"causal": causal[None, None], "right pads": right, "holes": holes | torch.eye(T, S, dtype=torch.bool),
            "window": (causal & ~causal.tril(S - T - 7))[None, None], "all": torch.ones_like(causal)[None, None]}


@pytest.mark.parametrize("name", masks(1, 1))
@pytest.mark.parametrize(("T", "S"), [(1, 1), (5, 5), (32, 32), (33, 33), (70, 70), (33, 50)])
def test_blocks_equal_attention_written_out(name, T, S, monkeypatch):
    monkeypatch.setattr(kernels, "WEIGHTS", 3000)  # several groups of examples
    seen = masks(T, S)[name]
    inputs = [torch.randn(3, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (T, S, S)]
    upstream = torch.randn(3, 2, T, 4, dtype=torch.float64)
    added = torch.randn(1, 1, T, S, dtype=torch.float64)
    low = torch.finfo(torch.float64).min
    given = (seen, 0.0), (added.masked_fill(~seen, low), added), (added.masked_fill(~seen, -torch.inf), added)
    for mask, bias in given:
        ours = kernels.attend(*inputs, kernels.plan(mask, inputs[0]), 0.3)
        right = written_out(*inputs, seen, 0.3, bias)
        for got, expected in zip([ours, *torch.autograd.grad(ours, inputs, upstream)],
                                 [right, *torch.autograd.grad(right, inputs, upstream)]):
            assert torch.allclose(got, expected, rtol=1e-11, atol=1e-12)


def test_a_query_that_sees_nothing_gets_zero_as_in_pytorch():
    seen = masks(9, 9)["causal"].expand(3, 1, 9, 9).clone()
    seen[0, ..., :3] = False  # left pads: the first three queries of example 0 see nothing
    inputs = [torch.randn(3, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    ours = kernels.attend(*inputs, kernels.plan(seen, inputs[0]), 0.5)
    right = F.scaled_dot_product_attention(*inputs, attn_mask=seen, scale=0.5)
    assert not ours[0, :, :3].any()
    for got, expected in zip([ours, *torch.autograd.grad(ours.square().sum(), inputs)],
                             [right, *torch.autograd.grad(right.square().sum(), inputs)]):
        assert torch.allclose(got, expected, rtol=1e-11, atol=1e-12)


def counted(monkeypatch):
    calls, attend = [], kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *args: calls.append(len(args)) or attend(*args))
    return calls


def neo(width=4):
    torch.manual_seed(0)
    return GPTNeoForCausalLM(GPTNeoConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=3 * width, num_layers=2, num_heads=3, intermediate_size=20,
        max_position_embeddings=40, bos_token_id=0, eos_token_id=0, attention_types=[[["global", "local"], 1]],
        window_size=5)).eval()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2", "llama"])
def test_the_blocks_are_taken_and_give_the_models_own_gradients(kind, left, monkeypatch):
    model = neo() if kind == "gpt_neo" else tiny.MODELS[kind]()
    layers, batch = linear_layers(model, tiny.LAYERS), tiny.batches(tiny.stories(prompt=1), size=9, left=left)[0]
    calls = counted(monkeypatch)
    with frozen(model):
        slow = token_gradients(model, batch, layers, causal_lm)
        assert not calls
        assert "kernels" in fast_paths(model, batch, layers, causal_lm)
        assert len(calls) == 2
        fast = token_gradients(model, batch, layers, causal_lm, fast=["kernels"])
    tolerance = 1e-5 if kind == "gpt_neo" else 1e-11
    for name in layers:
        for one, other in ((slow.inputs, fast.inputs), (slow.outputs, fast.outputs)):
            assert (one[name] - other[name]).norm() <= tolerance * one[name].norm()


def test_wide_heads_of_gpt_neo_go_to_pytorch(monkeypatch):
    model, calls, asked = neo(width=16), counted(monkeypatch), F.scaled_dot_product_attention
    layers, batch = linear_layers(model, tiny.LAYERS), tiny.batches(tiny.stories(prompt=1), size=9)[0]
    with frozen(model):
        slow = token_gradients(model, batch, layers, causal_lm)
        seen = []
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.append(0) or asked(*a, **k))
        fast = token_gradients(model, batch, layers, causal_lm, fast=["kernels"])
    assert len(seen) == 2 and not calls
    for name in layers:
        assert (slow.outputs[name] - fast.outputs[name]).norm() <= 1e-5 * slow.outputs[name].norm()


def test_the_gelu_spelled_out_is_one_kernel_with_the_same_numbers(monkeypatch):
    model, asked, calls = tiny.gpt2(), F.gelu, []
    layers, batch = linear_layers(model, tiny.LAYERS), tiny.batches(tiny.stories(prompt=1), size=9)[0]
    monkeypatch.setattr(F, "gelu", lambda x, **options: calls.append(options) or asked(x, **options))
    with frozen(model):
        slow = token_gradients(model, batch, layers, causal_lm)
        assert not calls
        fast = token_gradients(model, batch, layers, causal_lm, fast=["kernels"])
        assert calls == [{"approximate": "tanh"}] * model.config.n_layer
        monkeypatch.setattr(F, "gelu", lambda x, **options: asked(x))  # the exact GELU is another function
        assert fast_paths(model, batch, layers, causal_lm) == ["head"]
    for name in layers:
        assert torch.allclose(slow.outputs[name], fast.outputs[name], rtol=1e-10, atol=1e-13)


def test_a_classifier_that_reads_both_ways(monkeypatch):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=37, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20)).double()
    ids, mask = torch.randint(37, (4, 9)), torch.ones(4, 9, dtype=torch.long)
    mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0])}
    layers, calls = linear_layers(model, "attention|intermediate"), counted(monkeypatch)
    with frozen(model):
        assert fast_paths(model, batch, layers, classification) == ["kernels"]
        slow, fast = (token_gradients(model, batch, layers, classification, fast=taken)
                      for taken in ([], ["kernels"]))
    assert calls
    for name in layers:
        assert torch.allclose(slow.outputs[name], fast.outputs[name], rtol=1e-10, atol=1e-12)


def test_a_wrong_kernel_is_not_taken(monkeypatch):
    model = tiny.llama()
    layers, batch = linear_layers(model, "mlp"), tiny.batches(tiny.stories())[0]
    attend = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *args: attend(*args) * (1 + 1e-6))
    with frozen(model):
        assert fast_paths(model, batch, layers, causal_lm) == ["head"]


@pytest.mark.parametrize(("slow", "pays"), [("attend", False), ("kernel", True)])
def test_blocks_are_taken_where_they_pay(slow, pays, monkeypatch):
    monkeypatch.undo()
    calls, q, state = counted(monkeypatch), torch.randn(1, 2, 6, 8), torch.random.get_rng_state()
    place, name = (kernels, "attend") if slow == "attend" else (F, "scaled_dot_product_attention")
    quick = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args, **options: time.sleep(0.5) or quick(*args, **options))
    kernels.blocks_pay.cache_clear()
    try:
        assert kernels.blocks_pay(8, torch.get_num_threads()) is pays
        assert torch.random.get_rng_state().equal(state), "the draws of a user's program are its own"
        before = len(calls)
        monkeypatch.setattr(place, name, quick)
        with kernels.fast_kernels(torch.nn.Identity()):
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
        assert len(calls) - before == pays
    finally:
        kernels.blocks_pay.cache_clear()


def test_what_the_blocks_do_not_do_goes_to_pytorch(monkeypatch):
    calls = counted(monkeypatch)
    q = torch.randn(2, 4, 6, 8)
    with kernels.fast_kernels(torch.nn.Identity()):
        per_head = torch.ones(2, 4, 6, 6, dtype=torch.bool).tril()
        learned = torch.zeros(6, 6, requires_grad=True)
        for args, options in (((q, q, q), {"attn_mask": per_head}), ((q, q, q), {"attn_mask": learned}),
                              ((q, q, q), {}), ((q[0], q[0], q[0]), {"is_causal": True}),
                              ((q, q, q), {"dropout_p": 0.5, "is_causal": True}),
                              ([torch.randn(2, 4, 6, 16)] * 3, {"is_causal": True}),
                              ((q, q, torch.randn(2, 4, 6, 4)), {"is_causal": True}),  # values of another width
                              ([q.bfloat16()] * 3, {"is_causal": True})):
            F.scaled_dot_product_attention(*args, **options)
        assert not calls
        grouped = F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], is_causal=True, enable_gqa=True)
        assert len(calls) == 1
    expected = F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], is_causal=True, enable_gqa=True)
    assert torch.allclose(grouped, expected, atol=1e-6)
    assert len(calls) == 1


@pytest.mark.parametrize("shape", [(2, 1, 1, 6), (1, 1, 1, 6), (1, 6), (6, 6), (2, 1, 6, 6)])
def test_a_mask_may_leave_out_axes_as_in_pytorch(shape, monkeypatch):
    calls, q = counted(monkeypatch), torch.randn(2, 4, 6, 8, dtype=torch.float64)
    mask = torch.rand(shape) < 0.5
    mask[..., 2] = True
    with kernels.fast_kernels(torch.nn.Identity()):
        ours = F.scaled_dot_product_attention(q, q, q, mask)
    assert calls and torch.allclose(ours, F.scaled_dot_product_attention(q, q, q, mask), rtol=1e-11, atol=1e-12)


def test_the_model_comes_back_as_it_was():
    model = neo()
    before = [set(vars(module)) for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), kernels.fast_kernels(model):
        assert [{"_attn", "forward"} & set(vars(module)) != set() for module in model.modules()].count(True) == 4
        raise RuntimeError("stop")
    assert [set(vars(module)) for module in model.modules()] == before
