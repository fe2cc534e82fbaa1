"""Train the bundled tokenizer and GPT-Neo on the bundled corpus: `python -m helpers.bundled.train --seed 1`.

Every story is one sequence, BOS + story + EOS, padded and masked, just as the notebooks evaluate it. The weights after
each pass are kept in the work folder, and those of the last one after one more in which the rate falls to nothing
(`cooled`, the bundled model); a run that was killed goes on after its last whole pass.
"""
import argparse
import gzip
import json
import math
import os
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import distributed, multiprocessing
from transformers import GPTNeoForCausalLM, PreTrainedTokenizerFast

from helpers.bundled.start import POSITIONS, VOCABULARY, new_model

HERE = Path(__file__).parent
BOS, PAD = "<|endoftext|>", "<|pad|>"  # tokens 0 and 1
PAD_ID = 1
BATCH, RATE, WARMUP, DROPOUT = 16, 4e-3, 200, 0.1


def read(name):
    """Rows of a JSON-lines file beside this one."""
    opened = gzip.open if name.endswith(".gz") else open
    with opened(HERE / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def train_tokenizer(texts):
    """Byte-level BPE whose post-processor puts BOS first, as Llama's does; EOS is the same token, pad another one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[BOS, PAD], initial_alphabet=alphabet,
                                  show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=PAD,
                                   model_max_length=POSITIONS)


def encode(texts, tokenizer):
    """Token ids of each story, BOS and EOS included. A story longer than the context is an error."""
    ids = [row + [tokenizer.eos_token_id] for row in tokenizer(texts)["input_ids"]]
    longest = max(map(len, ids))
    if longest > POSITIONS:
        raise ValueError(f"a story has {longest} tokens, the model reads {POSITIONS}")
    return ids


def pad(rows, pad_id):
    """Batch dict of token-id lists: padded on the right, masked by position, no loss on pads."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def epoch_batches(ids, seed):
    """Indices in batches of like length: shuffled, sorted within windows of 20 batches, shuffled again."""
    generator, size = torch.Generator().manual_seed(seed), 20 * BATCH
    order = torch.randperm(len(ids), generator=generator).tolist()
    order = [i for k in range(0, len(order), size) for i in sorted(order[k:k + size], key=lambda i: len(ids[i]))]
    batches = [order[k:k + BATCH] for k in range(0, len(order), BATCH)]
    return [batches[k] for k in torch.randperm(len(batches), generator=generator)]


@torch.no_grad()
def mean_loss(model, ids):
    """Mean loss per token, in nats."""
    total = count = 0.0
    for k in range(0, len(ids), 64):
        batch = pad(ids[k:k + 64], PAD_ID)
        n = (batch["labels"][:, 1:] != -100).sum().item()
        total, count = total + model(**batch).loss.item() * n, count + n
    return total / count


@torch.no_grad()
def probability(model, tokenizer, pairs):
    """P(completion | prompt) of each (prompt, completion): the product over the completion's tokens."""
    result = []
    for k in range(0, len(pairs), 64):
        prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs[k:k + 64]]
        rows = [p + tokenizer(c, add_special_tokens=False)["input_ids"] for p, (_, c) in zip(prompts, pairs[k:k + 64])]
        batch = pad(rows, PAD_ID)
        logp = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
        for i, (prompt, row) in enumerate(zip(prompts, rows)):
            result.append(math.exp(sum(logp[i, t - 1, row[t]].item() for t in range(len(prompt), len(row)))))
    return result


def fact_table(model, tokenizer):
    """For each fact: tellings, split, P(completion), and the mean of it over the untaught names in the same prompt."""
    names = read("names.jsonl")
    facts = list({row["fact"]: row for row in read("facts.jsonl.gz")}.values())
    untaught, kids, pairs = [p for p in names if not p["fact"]], {p["name"]: p["kid"] for p in names}, []
    for fact in facts:
        name = fact["fact"].split("-")[0]
        for person in [{"name": name, "kid": kids[name]}, *untaught]:
            prompt = fact["prompt"].replace(name, person["name"]).replace(f" {kids[name]} ", f" {person['kid']} ")
            pairs.append((prompt, fact["completion"]))
    p = torch.tensor(probability(model, tokenizer, pairs)).view(len(facts), -1)
    return [{"fact": f["fact"], "tellings": f["tellings"], "split": f["split"], "p": row[0].item(),
             "control": row[1:].mean().item()} for f, row in zip(facts, p)]


def report(model, tokenizer, train_ids, held_out_ids):
    """One line of the log: losses, and the median P(completion) by number of tellings beside an untaught name."""
    model.eval()
    table = fact_table(model, tokenizer)
    middle = lambda values: sorted(values)[len(values) // 2]
    counts = {n: [row for row in table if row["tellings"] == n] for n in sorted({row["tellings"] for row in table})}
    facts = " ".join(f"{n}:{middle([r['p'] for r in rows]):.2f}/{middle([r['control'] for r in rows]):.3f}"
                     for n, rows in counts.items())
    return f"train {mean_loss(model, train_ids):.3f} held-out {mean_loss(model, held_out_ids):.3f} facts {facts}"


def average_gradients(model):
    """Replace every gradient by its mean over the processes."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for p, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()])):
        p.grad.copy_(part.view_as(p))


def one_pass(model, optimizers, ids, order, rate, dropout, rank, processes, left_out=None):
    """One pass over the corpus, in the order that the seed `order` gives; rate(k, n) is the rate of step k of n.

    left_out: {story: positions of the tokens, or a slice, on which no loss is taken}; batches and steps stay the same.
    """
    torch.manual_seed(2 * order + rank)
    model.train()
    for layer in (model.transformer.drop, *(block.mlp.dropout for block in model.transformer.h)):
        layer.p = dropout  # only here: it is 0 in the configuration that is saved
    batches = epoch_batches(ids, order)
    for k, indices in enumerate(batches):
        batch = pad([ids[i] for i in indices[rank::processes]], PAD_ID)
        for labels, i in zip(batch["labels"], indices[rank::processes]):
            labels[(left_out or {}).get(i, [])] = -100
        model(**batch).loss.backward()
        average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate(k, len(batches))
            optimizer.step()
        model.zero_grad()


def running(epoch, passes):
    """rate(k, n) of a pass of the run: it warms up, then falls along a cosine, to a tenth one pass later."""
    return lambda k, n: RATE * min((epoch * n + k + 1) / WARMUP, 1) * (
        0.55 + 0.45 * math.cos(math.pi * (epoch + k / n) / (passes + 1)))


def cooling(passes):
    """rate(k, n) of the pass that cools: from what the run ended with to nothing."""
    return lambda k, n: running(passes, passes)(0, n) * min(2 * (k + 1) / WARMUP, 1) * (1 - k / n)


def prepare(rank, processes, meeting):
    """(tokenizer, ids of the training stories, of the held-out ones) of one of the processes, which meet in that file.

    Each process takes its share of every batch with one thread, which uses two cores better than two threads do.
    """
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    texts, held_out = ([row["text"] for row in read(f"stories_{s}.jsonl.gz")] for s in ("train", "validation"))
    tokenizer = train_tokenizer(texts)
    return tokenizer, encode(texts, tokenizer), encode(held_out, tokenizer)


def new_optimizers(model):
    """Muon for the matrices of the blocks, at AdamW's rate (Liu et al. 2025, arXiv 2502.16982); AdamW for the rest."""
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [torch.optim.Muon(matrices, lr=RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)]


def train(rank, processes, meeting, seed, passes, work):
    """Train from scratch, or on from the last whole pass in `work`; the weights after every pass stay there."""
    tokenizer, ids, held_out = prepare(rank, processes, meeting)
    model = new_model(seed)
    optimizers = new_optimizers(model)
    saved = torch.load(work / "state.pt") if (work / "state.pt").exists() else {"epoch": 0}
    for part, state in zip((model, *optimizers), saved.get("parts", ())):
        part.load_state_dict(state)
    for epoch in range(saved["epoch"], passes):
        start = time.time()
        one_pass(model, optimizers, ids, 1000 * seed + epoch, running(epoch, passes), DROPOUT, rank, processes)
        taken = time.time() - start
        if rank == 0:
            print(f"pass {epoch + 1} {report(model, tokenizer, ids[:500], held_out)} {taken:.0f} s", flush=True)
            [part.save_pretrained(work / f"pass{epoch + 1:02d}") for part in (model, tokenizer)]
            parts = [part.state_dict() for part in (model, *optimizers)]
            torch.save({"parts": parts, "epoch": epoch + 1}, work / "state.pt")
        distributed.barrier()


def cool(rank, processes, meeting, seed, passes, work):
    """One more pass after the run, without dropout, in which the rate falls to nothing and the weights come to rest."""
    tokenizer, ids, held_out = prepare(rank, processes, meeting)
    model = GPTNeoForCausalLM.from_pretrained(work / f"pass{passes:02d}")
    one_pass(model, new_optimizers(model), ids, 1000 * seed + passes, cooling(passes), 0.0, rank, processes)
    if rank == 0:
        print(f"cooled {report(model, tokenizer, ids[:500], held_out)}", flush=True)
        [part.save_pretrained(work / "cooled") for part in (model, tokenizer)]
    distributed.barrier()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("out/training"))
    args = parser.parse_args()
    work = args.work / f"seed{args.seed}"
    work.mkdir(parents=True, exist_ok=True)
    for part in (train, cool):
        meeting = (work / f"{part.__name__}-{os.getpid()}").resolve()
        multiprocessing.spawn(part, (args.processes, meeting, args.seed, args.passes, work), args.processes)


if __name__ == "__main__":
    main()
