"""Small random models in float64 and batches for them: every architecture that the helpers must handle."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCABULARY = 37


def gpt_neo():
    """nn.Linear; biases in the MLP and the attention output, none in q, k, v; one global and one local layer."""
    return _double(GPTNeoForCausalLM, GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=12, num_layers=2, num_heads=3, intermediate_size=20,
        max_position_embeddings=40, bos_token_id=0, eos_token_id=0,
        attention_types=[[["global", "local"], 1]], window_size=5))


def gpt2():
    """Conv1D, all with biases, q, k and v in one."""
    return _double(GPT2LMHeadModel, GPT2Config(
        vocab_size=VOCABULARY, n_embd=12, n_layer=2, n_head=3, n_inner=20, n_positions=40,
        bos_token_id=0, eos_token_id=0))


def llama():
    """nn.Linear without biases, gated MLP, grouped-query attention."""
    return _double(LlamaForCausalLM, LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=20, max_position_embeddings=40))


MODELS = {"gpt_neo": gpt_neo, "gpt2": gpt2, "llama": llama}
LAYERS = r"mlp|attn"
# GPT-Neo casts queries and keys to float32 inside its attention, also in a float64 model; the others are exact.
RTOL = {"gpt_neo": 1e-5, "gpt2": 1e-10, "llama": 1e-10}


def rtol(model):
    return RTOL[{"GPTNeoForCausalLM": "gpt_neo", "GPT2LMHeadModel": "gpt2", "LlamaForCausalLM": "llama"}[
        type(model).__name__]]


def close(model, x, y):
    """Equal to the rounding that the model itself has, against the largest entry."""
    return torch.allclose(x, y, rtol=rtol(model), atol=rtol(model) * float(y.abs().max()))


def _double(kind, config):
    torch.manual_seed(0)
    model = kind(config).double().eval()
    with torch.no_grad():  # biases and layer norms start at constants, which would hide mistakes
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def stories(n=9, seed=0, prompt=0):
    """n random sequences (input_ids, labels) of 4 to 11 tokens; the first `prompt` labels are -100."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        ids = torch.randint(VOCABULARY, (int(torch.randint(4, 12, (1,), generator=generator)),), generator=generator)
        labels = ids.clone()
        labels[:prompt] = -100
        out.append((ids, labels))
    return out


def batches(examples, size=4, extra_pads=0, left=False):
    """Right-padded (or left-padded) batches of `size` examples, with `extra_pads` columns that nobody needs."""
    out = []
    for start in range(0, len(examples), size):
        part = examples[start:start + size]
        width = max(len(ids) for ids, _ in part) + extra_pads
        batch = {"input_ids": torch.full((len(part), width), 5), "attention_mask": torch.zeros(len(part), width).long(),
                 "labels": torch.full((len(part), width), -100)}
        for row, (ids, labels) in enumerate(part):
            at = slice(width - len(ids), width) if left else slice(0, len(ids))
            batch["input_ids"][row, at], batch["attention_mask"][row, at] = ids, 1
            batch["labels"][row, at] = labels
        out.append(batch)
    return out


def loss_of(model, ids, labels):
    """The summed next-token loss of one unpadded sequence, written from the definition."""
    logp = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
    return -sum(logp[t, labels[t + 1]] for t in range(len(ids) - 1) if labels[t + 1] != -100)


def weight_gradient(model, layer, loss):
    """autograd's gradient of a layer as [d_out, d_in (+1)], the bias column last."""
    module = model.get_submodule(layer)
    transposed = type(module).__name__ == "Conv1D"
    wanted = [module.weight] + ([] if module.bias is None else [module.bias])
    weight, *bias = torch.autograd.grad(loss, wanted, retain_graph=True)
    return torch.cat([weight.T if transposed else weight, *(b[:, None] for b in bias)], 1)
