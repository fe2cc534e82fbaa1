"""Texts to batches: the Hugging Face dict input_ids, attention_mask, labels, each int64 [texts, longest of the batch].

Texts are padded on the right whatever the tokenizer's own side, and pads are known by position, never by their id: a
pad token that is also the end-of-text token (or a tokenizer with no pad token at all) changes nothing, and the
tokenizer comes back as it was. Labels are the inputs themselves, unshifted, and -100 where no loss is taken.
"""

import re

import torch

from .tasks import IGNORED


def tokenize(texts, tokenizer, max_length=256, batch_size=16, add_special_tokens=True):
    """Batches in the order of `texts`, with a label on every token that the tokenizer gives, -100 on pads.

    The tokens are the tokenizer's own: a start or end token is there if and only if its post-processor adds one; with
    add_special_tokens=False (texts from a chat template have theirs already) it adds none.
    Texts of more than max_length tokens (or than tokenizer.model_max_length, if that is less) keep their beginning and
    what the tokenizer adds at the end; how many were cut, and how much of them, is printed in one line.

    Raises ValueError for no texts, and for a text of less than two tokens, which has nothing to predict; TypeError for
    what is not a string.
    """
    texts = _strings(texts)
    limit = _limit(tokenizer, max_length, batch_size)
    encoded = _encode(tokenizer, texts, add_special_tokens)
    rows = [_cut(ids, special, limit) for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"])]
    for index, ids in enumerate(rows):
        if len(ids) < 2:
            raise ValueError(
                f"texts[{index}] = {_short(texts[index])} gives {len(ids)} token(s), so no token has another one to be "
                "predicted from; leave it out, or use a tokenizer that adds a start token"
            )
    _say_cuts(encoded["input_ids"], rows, limit)
    return _collate(rows, [list(ids) for ids in rows], tokenizer, batch_size)


def completions(pairs, tokenizer, max_length=256, batch_size=16, add_special_tokens=True):
    """Batches in the order of `pairs` = (prompt, completion), with the loss on the completion only.

    The two are joined as they are (begin the completion with its space) and tokenized as one text, as the model met
    such text in training. A token counts as completion if it holds at least one of its characters: where a token
    crosses the boundary, as " jam" does in ("Tom likes ", "jam"), the loss includes it whole. What the tokenizer adds
    itself, such as an end token, is not part of the completion; add_special_tokens as in `tokenize`. Training data of
    prompts and answers are such pairs too.

    Raises ValueError for no pairs, an empty completion or one without tokens, a completion whose first token has none
    before it, and a pair longer than max_length (a cut would change the question); names the pair. A tokenizer without
    offsets (is_fast is False) must have a token boundary where the completion begins; else ValueError.
    """
    pairs = _pairs(pairs)
    limit = _limit(tokenizer, max_length, batch_size)
    encoded = _encode(tokenizer, [prompt + completion for prompt, completion in pairs], add_special_tokens)
    rows, labels = encoded["input_ids"], []
    for index, (prompt, completion) in enumerate(pairs):
        ids, text, where = rows[index], prompt + completion, f"pairs[{index}] = {_short((prompt, completion))}"
        if len(ids) > limit:
            raise ValueError(f"{where} has {len(ids)} tokens, more than {limit}; raise max_length or shorten it")
        first, last = _span(tokenizer, encoded, index, text, len(prompt), len(text), where)
        if first == 0:
            raise ValueError(f"{where}: no token stands before the completion's first one; give a longer prompt")
        labels.append([IGNORED] * first + ids[first:last] + [IGNORED] * (len(ids) - last))
    return _collate(rows, labels, tokenizer, batch_size)


def token_span(tokenizer, text, start, end):
    """(first, last + 1) of the tokens that hold a character of text[start:end], counted in the ids of `tokenize`.

    A start token that the tokenizer adds counts: the first word then begins at 1. The count is of the whole text: a
    span beyond the max_length given to `tokenize` was cut there. Raises ValueError for an empty span, one outside the
    text, one without tokens, and, for a tokenizer without offsets, one that begins or ends inside a token.
    """
    if not 0 <= start < end <= len(text):
        raise ValueError(f"start={start}, end={end} is no span of a text of {len(text)} characters: 0 <= start < end")
    check_unicode(text, "text")
    return _span(tokenizer, _encode(tokenizer, [text]), 0, text, start, end, f"text[{start}:{end}]")


def check_unicode(text, where):
    """ValueError that begins with `where` for a text with half of a surrogate pair, which no tokenizer or file takes.

    JSON can hold one (a cut text, "\\ud83d"), and Python makes them of bytes on the command line that are not UTF-8.
    """
    found = re.search("[\ud800-\udfff]", text)
    if found:
        raise ValueError(f"{where}: character {found.start()} is the lone surrogate {found[0]!r}, which is not Unicode "
                         "text; mend the text, or leave it out")


def _short(value):
    """repr(value), or the beginning of a long one."""
    return text if len(text := repr(value)) <= 200 else text[:200] + "…"


def _strings(texts):
    if isinstance(texts, str):
        raise TypeError(f"texts is one string, {texts[:40]!r}…; give a list of strings")
    if not hasattr(texts, "__iter__"):
        raise TypeError(f"texts is a {type(texts).__name__}; give a list of strings, and the tokenizer after it")
    texts = list(texts)
    if not texts:
        raise ValueError("texts is empty; give at least one text")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}] = {_short(text)} is a {type(text).__name__}, not a string")
        check_unicode(text, f"texts[{index}]")
    return texts


def _pairs(pairs):
    pairs = list(pairs)
    if not pairs:
        raise ValueError("pairs is empty; give at least one (prompt, completion)")
    for index, pair in enumerate(pairs):
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise TypeError(f"pairs[{index}] = {_short(pair)} is not a pair of strings (prompt, completion)")
        if not pair[1]:
            raise ValueError(f"pairs[{index}] = {_short(pair)}: the completion is empty; nothing to take a loss on")
        check_unicode("".join(pair), f"pairs[{index}]")
    return [tuple(pair) for pair in pairs]


def _limit(tokenizer, max_length, batch_size):
    """The most tokens a row may have."""
    if not isinstance(max_length, int) or max_length < 2:
        raise ValueError(f"max_length={max_length!r}: a row needs 2 tokens or more, one to predict from and its target")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number, 1 or more")
    return min(max_length, tokenizer.model_max_length)


def _encode(tokenizer, texts, add_special_tokens=True):
    """Ids of every text, uncut and unpadded, which of them the tokenizer added, and, if it is fast, their offsets."""
    return tokenizer(texts, add_special_tokens=add_special_tokens, return_special_tokens_mask=True,
                     return_offsets_mapping=tokenizer.is_fast, verbose=False)


def _added(special):
    """How many tokens the tokenizer put (before, after) the text; `special` is 1 on those."""
    ones = [next((i for i, added in enumerate(side) if not added), len(special)) for side in (special, special[::-1])]
    return ones[0], ones[1]


def _cut(ids, special, limit):
    """The first `limit` ids, of which the last are those that the tokenizer adds at the end."""
    if len(ids) <= limit:
        return ids
    after = min(_added(special)[1], limit)
    return ids[: limit - after] + ids[len(ids) - after :]


def _say_cuts(uncut, rows, limit):
    """Print how many texts were cut: in a notebook it shows as output, where a warning would go to stderr."""
    lost = [len(before) - len(after) for before, after in zip(uncut, rows)]
    cut = sum(n > 0 for n in lost)
    if cut:
        print(
            f"tokenize: cut {cut:,} of {len(rows):,} texts to {limit:,} tokens "
            f"({sum(lost):,} of {sum(map(len, uncut)):,} tokens left out)"
        )


def _span(tokenizer, encoded, index, text, start, end, where):
    """(first, last + 1) of the tokens of text number `index` that hold a character of text[start:end]."""
    if not tokenizer.is_fast:
        ids, (_, after) = encoded["input_ids"][index], _added(encoded["special_tokens_mask"][index])
        span = [_boundary(tokenizer, ids, text, at, after, where) for at in (start, end)]
    else:
        offsets = encoded["offset_mapping"][index]
        held = [i for i, (begin, stop) in enumerate(offsets) if begin < end and stop > start]
        span = (held[0], held[-1] + 1) if held else (0, 0)
    if span[0] == span[1]:
        raise ValueError(f"{where}: {_short(text[start:end])} gives no token of its own")
    return tuple(span)


def _boundary(tokenizer, ids, text, at, after, where):
    """How many of `ids` come before character `at`: the ids of text[:at], which must be the first of `ids`."""
    head = _encode(tokenizer, [text[:at]])["input_ids"][0]
    head = head[: len(head) - after]
    if ids[: len(head)] != head:
        raise ValueError(
            f"{where}: {type(tokenizer).__name__} gives no offsets and character {at} is not between two tokens; "
            "use a fast tokenizer, or move the boundary, for instance to before the space"
        )
    return len(head)


def _collate(rows, labels, tokenizer, batch_size):
    """Dicts of at most batch_size rows each, in order; attention_mask is 1 on the row's own tokens, 0 on pads."""
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    batches = []
    for at in range(0, len(rows), batch_size):
        some = rows[at : at + batch_size]
        columns = {"input_ids": (some, pad), "attention_mask": ([[1] * len(ids) for ids in some], 0)}
        columns["labels"] = (labels[at : at + batch_size], IGNORED)
        width = max(map(len, some))
        batches.append(
            {
                name: torch.tensor([row + [fill] * (width - len(row)) for row in values])
                for name, (values, fill) in columns.items()
            }
        )
    return batches
