"""tokenize, completions and token_span against the tokenizers' own padding and against character counts by hand."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from helpers.batches import completions, token_span, tokenize
from helpers.sources import ROOT, load_lm, load_stories

DATA = ROOT.parent / "shared" / "data"
TEXTS = [
    "Tom likes jam. Sue likes ham and jam.",
    "A bee.",
    "Once upon a time there was a little girl who liked to play in the park with her unhappy dog.",
    "Sue said <end> and then <end>",
    "Ben — a cat — said “no” 🙂.",
]


def byte_bpe(start=False, end=False, pad=None):
    """A byte-level BPE tokenizer (GPT-2's kind) of 256 bytes, two special tokens and some merges."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<start>", "<end>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    bpe.train_from_iterator(TEXTS * 4, trainer)
    if start or end:
        pieces = ["<start>"] * start + ["$A"] + ["<end>"] * end
        bpe.post_processor = processors.TemplateProcessing(
            " ".join(pieces), special_tokens=[("<start>", 0), ("<end>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<start>", eos_token="<end>", pad_token=pad)


def word_piece():
    """BERT's kind: lower case, [CLS] before and [SEP] after."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"tom likes jam un ##happy happy dog . , a".split(), "##s"]
    bert = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    bert.normalizer, bert.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    bert.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    return PreTrainedTokenizerFast(tokenizer_object=bert, model_max_length=12, **special)


def stories260k():
    if not DATA.exists():
        pytest.skip(f"the public model is not in {DATA}")
    return load_lm("../shared/data/stories260k").tokenizer


KINDS = {"plain": byte_bpe, "start": lambda: byte_bpe(start=True), "end": lambda: byte_bpe(end=True, pad="<end>"),
         "bert": word_piece, "bytes": ByT5Tokenizer, "stories260k": stories260k}  # fmt: skip
PLAIN = byte_bpe()


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def lost(batch, row=0):
    """Ids that take a loss in a row."""
    return [i for i in batch["labels"][row].tolist() if i != -100]


# tokenize ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [6, 10, 200])
def test_batches_are_those_of_the_tokenizer(tokenizer, max_length):
    batches = tokenize(TEXTS, tokenizer, max_length=max_length, batch_size=2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    reference = copy.deepcopy(tokenizer)
    for i, text in enumerate(TEXTS):  # one at a time, so that nothing is padded
        limit = min(max_length, tokenizer.model_max_length)
        ids = reference(text, truncation=True, max_length=limit).input_ids
        batch, row = batches[i // 2], i % 2
        pads = batch["input_ids"].shape[1] - len(ids)
        assert batch["input_ids"][row].tolist()[: len(ids)] == ids
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * pads
        assert batch["labels"][row].tolist() == ids + [-100] * pads
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert all(value.dtype == torch.int64 for value in batch.values())
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1], "padded further than the longest"


def test_pads_are_known_by_position_not_by_id():
    for tokenizer in (byte_bpe(pad="<end>"), byte_bpe()):  # the pad token is the end token, or there is none
        batch = tokenize([TEXTS[3], TEXTS[2]], tokenizer)[0]
        end = tokenizer.eos_token_id
        real = batch["attention_mask"][0].sum()
        assert (batch["input_ids"][0, real:] == end).all() and real < batch["input_ids"].shape[1]
        assert (batch["labels"][0] == end).sum() == 2, "the text's own end tokens keep their loss"
        assert (batch["labels"][0, real:] == -100).all()
    nothing = PreTrainedTokenizerFast(tokenizer_object=PLAIN.backend_tokenizer)
    assert tokenize(TEXTS, nothing)[0]["input_ids"][1, -1] == 0


def test_the_tokenizer_comes_back_as_it_was():
    tokenizer = byte_bpe(start=True)
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    before = tokenizer.backend_tokenizer.to_str()
    batch = tokenize(TEXTS, tokenizer, max_length=10)[0]
    completions([("Tom", " likes")], tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before and tokenizer.pad_token is None
    assert tokenizer.padding_side == tokenizer.truncation_side == "left"
    assert batch["attention_mask"][1].tolist() == sorted(batch["attention_mask"][1].tolist(), reverse=True)
    assert batch["input_ids"][2].tolist() == tokenizer(TEXTS[2]).input_ids[:10], "the beginning is kept"


def test_cuts_are_counted_and_said(capfd):
    tokenizer = byte_bpe(start=True, end=True)
    lengths = [len(tokenizer(text).input_ids) for text in TEXTS]
    tokenize(TEXTS, tokenizer, max_length=max(lengths))
    assert capfd.readouterr() == ("", "")
    batch = tokenize(TEXTS, tokenizer, max_length=12)[0]
    cut, left_out = sum(n > 12 for n in lengths), sum(max(n - 12, 0) for n in lengths)
    said = f"tokenize: cut {cut} of 5 texts to 12 tokens ({left_out} of {sum(lengths)} tokens left out)\n"
    assert cut > 1 and capfd.readouterr() == (said, "")
    assert batch["input_ids"][2, 0] == tokenizer.bos_token_id and batch["input_ids"][2, 11] == tokenizer.eos_token_id


def test_no_row_is_longer_than_the_tokenizer_says_the_model_reads(capsys):
    assert tokenize(["tom likes jam . " * 9], word_piece())[0]["input_ids"].shape == (1, 12)
    assert "to 12 tokens" in capsys.readouterr().out


def test_texts_that_are_refused():
    for texts, changes, error, said in [
        ([], {}, ValueError, "texts is empty"),
        ("Tom", {}, TypeError, "texts is one string, 'Tom'"),
        (["Tom likes", None], {}, TypeError, r"texts\[1\] = None is a NoneType, not a string"),
        (["Tom likes", ""], {}, ValueError, r"texts\[1\] = '' gives 0 token"),
        (["Tom likes", "T"], {}, ValueError, r"texts\[1\] = 'T' gives 1 token.*adds a start token"),
        (["Tom likes"], {"max_length": 1}, ValueError, "max_length=1: a row needs 2 tokens or more"),
        (["Tom likes"], {"batch_size": 0}, ValueError, "batch_size=0"),
    ]:
        with pytest.raises(error, match=said):
            tokenize(texts, PLAIN, **changes)
    assert tokenize(["T"], byte_bpe(start=True))[0]["labels"].shape == (1, 2)


# completions ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_on_the_completion(tokenizer):
    for prompt, completion in [("tom likes", " jam."), ("a dog, un", " happy"), ("tom", " likes jam , a dog .")]:
        batch = completions([("a dog", " likes a dog"), (prompt, completion)], tokenizer)[0]
        ids = tokenizer(prompt + completion).input_ids
        real = batch["attention_mask"][1].sum()
        assert batch["input_ids"][1, :real].tolist() == ids, "tokenized as one text"
        assert tokenizer.decode(lost(batch, 1)).replace(" ", "") == completion.replace(" ", "")
        assert all(label in (-100, i) for label, i in zip(batch["labels"][1].tolist(), ids))


def test_what_the_tokenizer_adds_takes_no_loss():
    for tokenizer in (byte_bpe(start=True, end=True), word_piece(), ByT5Tokenizer()):
        batch = completions([("tom likes", " jam")], tokenizer)[0]
        assert batch["labels"][0, -1] == -100 and batch["attention_mask"].all()
        assert batch["input_ids"][0, -1] in (tokenizer.eos_token_id, tokenizer.sep_token_id)
    said = completions([("tom likes", " jam<end>")], PLAIN)[0]
    assert lost(said)[-1] == PLAIN.eos_token_id, "unless the completion says so itself"


def test_a_token_across_the_boundary_belongs_to_the_completion():
    whole, moved = (completions([pair], PLAIN)[0] for pair in (("Tom likes", " jam"), ("Tom likes ", "jam")))
    assert PLAIN.tokenize("Tom likes jam")[-1] == "Ġjam"
    assert all(torch.equal(whole[name], moved[name]) for name in whole)
    assert token_span(PLAIN, "Tom likes jam", 10, 13) == token_span(PLAIN, "Tom likes jam", 11, 12)


def spans_by_bytes(pieces, text, start, end, at=0):
    """Which pieces hold a byte of text[start:end], by counting bytes; the first piece begins at byte `at`."""
    begin, stop, held = len(text[:start].encode()), len(text[:end].encode()), []
    for i, size in enumerate(pieces):
        if at < stop and at + size > begin:
            held.append(i)
        at += size
    assert at == len(text.encode())
    return held[0], held[-1] + 1


def plain_pieces(text):
    """Bytes of each token of PLAIN: in its alphabet one printable character stands for one byte."""
    return [len(piece) for piece in PLAIN.tokenize(text)]


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("Tom likes jam and hé—🙂.\n "), min_size=2, max_size=30), st.data())
def test_any_boundary_in_any_text(text, data):
    at = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(at + 1, len(text)))
    expected = spans_by_bytes(plain_pieces(text), text, at, end)
    assert token_span(PLAIN, text, at, end) == expected
    first, last = spans_by_bytes(plain_pieces(text), text, at, len(text))
    if first == 0:
        with pytest.raises(ValueError, match="no token stands before"):
            completions([(text[:at], text[at:])], PLAIN)
    else:
        labels = completions([(text[:at], text[at:])], PLAIN)[0]["labels"][0].tolist()
        assert [i for i, label in enumerate(labels) if label != -100] == list(range(first, last))


def test_order_and_padding_of_pairs():
    pairs = [(text[:7], text[7:20]) for text in TEXTS if len(text) > 7]
    batches = completions(pairs, PLAIN, batch_size=3)
    rows = [lost(batch, row) for batch in batches for row in range(len(batch["labels"]))]
    alone = [lost(completions([pair], PLAIN)[0]) for pair in pairs]
    assert rows == alone and [len(batch["labels"]) for batch in batches] == [3, 1]


def test_pairs_that_are_refused():
    good = ("Tom", " likes")
    for pairs, changes, error, said in [
        ([], {}, ValueError, "pairs is empty"),
        ([good, "ab"], {}, TypeError, r"pairs\[1\] = 'ab' is not a pair"),
        ([good, ("a", 3)], {}, TypeError, r"pairs\[1\] = \('a', 3\) is not a pair"),
        ([good, ("Tom", "")], {}, ValueError, r"pairs\[1\] = \('Tom', ''\): the completion is empty"),
        ([good, ("", "Tom likes")], {}, ValueError, r"pairs\[1\].*no token stands before the completion"),
        ([good, TEXTS[:2]], {"max_length": 8}, ValueError, r"pairs\[1\].* has \d+ tokens, more than 8"),
    ]:
        with pytest.raises(error, match=said):
            completions(pairs, PLAIN, **changes)
    with pytest.raises(ValueError, match=r"pairs\[0\].*' ' gives no token of its own"):
        completions([("tom likes", " ")], word_piece())
    assert lost(completions([("", "Tom likes")], byte_bpe(start=True))[0]) == PLAIN("Tom likes").input_ids


# Tokenizers without offsets ------------------------------------------------------------------------------------------


def without_offsets(tokenizer, monkeypatch):
    """The same tokenizer, which says that it has none: the answers must not depend on them."""
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: self is not tokenizer))
    return tokenizer


@pytest.mark.parametrize("name", ["plain", "start", "end", "bert"])
def test_a_tokenizer_without_offsets_finds_the_same_spans(name, monkeypatch):
    fast, slow = KINDS[name](), without_offsets(KINDS[name](), monkeypatch)
    assert fast.is_fast and not slow.is_fast
    for start, end in [(3, 9), (9, 13), (0, 3), (13, 14)]:
        assert token_span(slow, "tom likes jam.", start, end) == token_span(fast, "tom likes jam.", start, end)
    ours, theirs = (completions([("tom likes", " jam .")], kind)[0]["labels"] for kind in (slow, fast))
    assert torch.equal(ours, theirs)


def test_a_tokenizer_without_offsets_refuses_a_boundary_inside_a_token(monkeypatch):
    with pytest.raises(ValueError, match="gives no offsets and character 10 is not between two tokens"):
        completions([("Tom likes ", "jam")], without_offsets(byte_bpe(), monkeypatch))


# token_span ----------------------------------------------------------------------------------------------------------


def test_spans_that_are_refused():
    for start, end in [(-1, 2), (2, 2), (3, 2), (0, 4)]:
        with pytest.raises(ValueError, match=f"start={start}, end={end} is no span of a text of 3 characters"):
            token_span(PLAIN, "Tom", start, end)
    with pytest.raises(ValueError, match=r"text\[3:4\]: ' ' gives no token"):
        token_span(word_piece(), "tom likes", 3, 4)


def test_spans_in_public_stories():
    tokenizer = stories260k()
    for text in load_stories("../shared/data/tinystories", limit=40)["text"]:
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(text, verbose=False).input_ids)
        sizes = [1 if re.fullmatch("<0x..>", piece) else len(piece.replace("▁", " ").encode()) for piece in pieces]
        assert pieces[0] == "<s>" and pieces[1][0] == "▁", "a start token, and a space before the text"
        for start in range(1, len(text) - 12, 7):
            expected = spans_by_bytes([0] + sizes[1:], text, start, start + 12, at=-1)
            assert token_span(tokenizer, text, start, start + 12) == expected


def test_batches_hold_the_ids_that_spans_count():
    tokenizer = byte_bpe(start=True, end=True)
    assert token_span(tokenizer, TEXTS[0], 0, 1) == (1, 2), "the start token counts"
    first, last = token_span(tokenizer, TEXTS[0], 4, 13)
    assert tokenizer.decode(tokenize(TEXTS, tokenizer)[0]["input_ids"][0, first:last]).strip() == "likes jam"


def test_a_text_that_has_its_special_tokens_gets_no_second_ones():
    tokenizer, text = byte_bpe(start=True, end=True), "<start>Tom likes jam.<end>"
    assert tokenize([text], tokenizer)[0]["input_ids"][0].tolist().count(tokenizer.bos_token_id) == 2
    (batch,) = tokenize([text], tokenizer, add_special_tokens=False)
    assert batch["input_ids"][0].tolist() == tokenize([text[7:-5]], tokenizer)[0]["input_ids"][0].tolist()
    (pair,) = completions([("<start>Tom likes", " jam.<end>")], tokenizer, add_special_tokens=False)
    assert pair["input_ids"].tolist() == batch["input_ids"].tolist()
    assert tokenizer.decode(pair["input_ids"][pair["labels"] != -100]) == " jam.<end>"
