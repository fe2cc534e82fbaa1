"""The model that training starts from: GPT-Neo, with random weights from which copying is soon learned.

With the usual start a model of this size takes most of its training to find out that a word above is a word below.
Three things help: large embeddings keep names apart; the product of value and output projections is half the identity,
as it is in trained models (Trockman & Kolter 2023, arXiv 2305.09828); and positions begin as waves (Vaswani et al.
2017, arXiv 1706.03762) that one head in each of the first two blocks reads, so that near and far differ from the start.
"""
import math

import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

VOCABULARY, HIDDEN, LAYERS, HEADS, POSITIONS = 2800, 96, 4, 6, 256
WAVES, HEIGHT, GAIN = 16, 0.3, 0.7  # sines and cosines of the position, their height, and the size of what reads them

CONFIG = GPTNeoConfig(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_layers=LAYERS, num_heads=HEADS, window_size=POSITIONS,
    attention_types=[[["global", "local"], LAYERS // 2]], max_position_embeddings=POSITIONS,
    embed_dropout=0.0, attention_dropout=0.0, resid_dropout=0.0, initializer_range=0.05,
    bos_token_id=0, eos_token_id=0, pad_token_id=1, use_cache=True)


def look_near(attention, rates):
    """Let the first head's keys be the position's waves and its queries the waves one place back: it looks near."""
    size = HIDDEN // HEADS
    query, key = attention.q_proj.weight, attention.k_proj.weight
    query[:size], key[:size] = 0.0, 0.0
    for row, wave in zip(range(0, size, 2), torch.linspace(0, WAVES - 1, size // 2).round().long().tolist()):
        rows, columns = slice(row, row + 2), slice(2 * wave, 2 * wave + 2)
        c, s = math.cos(rates[wave]), math.sin(rates[wave])
        query[rows, columns] = GAIN * torch.tensor([[c, -s], [s, c]])
        key[rows, columns] = GAIN * torch.eye(2)


@torch.no_grad()
def new_model(seed):
    """GPT-Neo before its first step, float32."""
    torch.manual_seed(seed)
    model = GPTNeoForCausalLM(CONFIG)
    model.transformer.wte.weight.mul_(4)
    for block in model.transformer.h:
        rotation = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN))[0]
        block.attn.attention.v_proj.weight.copy_(0.7 * rotation)
        block.attn.attention.out_proj.weight.copy_(0.7 * rotation.T)
    rates = math.pi / 2 * (POSITIONS / 2) ** (-torch.arange(WAVES) / (WAVES - 1))  # radians a place
    angles = torch.arange(POSITIONS)[:, None] * rates
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    model.transformer.wpe.weight[:, :2 * WAVES] = HEIGHT * waves
    for block in model.transformer.h[:2]:
        look_near(block.attn.attention, rates)
    return model
