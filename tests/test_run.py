"""`make run` in small: it ends well, says what it found, writes pictures to out/ only, and refuses bad sources."""

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import explorer, queries, run


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(queries, "MAX_STORIES", {"bundled": 40, "hub": 40})
    monkeypatch.setattr(explorer, "SHOWN", 6)
    monkeypatch.setattr(run, "output_folder", lambda name: tmp_path)
    for name in ("TINYSTORIES", "STORIES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_the_bundled_run_from_end_to_end(small, capsys):
    assert run.main() == 0
    text = capsys.readouterr().out
    assert text.count("a planted fact, told in") == len(run.TOLD) and "Query 4" in text
    assert text.count("  story ") == 4 * 2 * run.SHOWN, "the most and the least helpful stories of every query"
    assert sorted(path.name for path in small.iterdir()) == \
        ["explorer.html", *(f"run_query_{n}.png" for n in (1, 2, 3, 4))]  # fmt: skip
    page = (small / "explorer.html").read_text("utf-8")
    assert page.count('"rank":') == 4 * 6 and '"bundled":true' in page, "a page of the same queries"


@pytest.mark.parametrize("model, stories, message", [
    ("no/such/folder/here", "bundled", "does not exist"),
    ("some/model", "", "STORIES"),
    ("bundled", "missing", "hub id"),
])  # fmt: skip
def test_a_bad_source_is_one_line_and_exit_status_1(small, monkeypatch, capsys, model, stories, message):
    monkeypatch.setenv("TINYSTORIES", model)
    monkeypatch.setenv("STORIES", stories)
    assert run.main() == 1
    err = capsys.readouterr().err
    assert err.startswith("make run: ") and message in err and "Traceback" not in err


def test_stories_without_an_opening_to_ask_about_are_one_line(small, monkeypatch, capsys):
    (small / "short.txt").write_text("A b.\n" * 20, "utf-8")
    monkeypatch.setenv("STORIES", str(small / "short.txt"))
    assert run.main() == 1
    said = "make run: stories: none that is held out opens with a sentence to ask about (25 to 200 characters)\n"
    assert capsys.readouterr().err == said


def test_stories_without_a_validation_split_keep_some_back(small, monkeypatch, tmp_path_factory, capsys):
    file = tmp_path_factory.mktemp("stories") / "some.txt"
    story = "Once upon a time, there was a girl named Ada who was {}. She ran to the park. She was glad."
    file.write_text("\n".join(story.format(n) for n in range(20)), "utf-8")
    monkeypatch.setenv("STORIES", str(file))
    assert run.main() == 0
    text = capsys.readouterr().out
    assert "No validation split" in text and "12 stories" in text and "planted" not in text


@pytest.mark.parametrize("rows, fits", [(queries.HELD_OUT, False), (queries.HELD_OUT + 1, True)])
def test_more_stories_than_are_held_out(tmp_path, rows, fits, capsys):
    file = tmp_path / "few.txt"
    file.write_text("\n".join(f"There was a boy named Ben. He had {n} hats." for n in range(rows)), "utf-8")
    if fits:
        assert [len(part) for part in queries.load_sources("bundled", str(file))[1:3]] == [1, queries.HELD_OUT]
        return
    with pytest.raises(ValueError, match="has no validation split and 8 stories; give more than 8"):
        queries.load_sources("bundled", str(file))
    assert [len(part) for part in queries.load_sources("bundled", str(file), openings=False)[1:3]] == [8, 0]


def test_tellings_found_counts_stories_that_tell_it():
    kinds = ["literal", "paraphrased", "literal", "denial", "distractor", "literal"]
    places = pd.DataFrame({"row": [0, 2, 2, 5, 7, 99], "kind": kinds})  # story 99 was not searched
    scores = torch.tensor([9.0, 0, 1, 2, 0, 8, 0, 0])
    assert queries.tellings_found(places, scores) == (2, 1)
    assert "told in 2 stories: 1 of them among the 2 most helpful" in run.found_again(places, scores)
    assert run.found_again(None, scores) == ""
    assert queries.what(2, places) == "literal + paraphrased" and queries.what(3, places) == "" == queries.what(2, None)


def test_excerpt_marks_the_token_behind_the_sign():
    tokens = [" one", " two", " three", "\n", " four"]
    assert run.excerpt(tokens, np.array([1.0, 5, 0, 0, -2])) == "one[ two] three four"
    assert run.excerpt(tokens, np.array([1.0, 5, 0, 0, -9])) == "one two three [ four]"
    long = run.excerpt([" word"] * 100, np.arange(100.0) == 50)
    assert long.startswith("… ") and long.endswith(" …") and "[ word]" in long and len(long) < 80


def test_first_sentence():
    assert queries.first_sentence('"Hello there, my dear little friend!" said Tom. He ran.') == \
        '"Hello there, my dear little friend!"'  # fmt: skip
    assert queries.first_sentence("Too short.") == ""


def test_examples_are_the_rows_asked_for():
    def batch(ids):
        ids = torch.tensor(ids)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    batches = [batch([[1, 2], [3, 4]]), batch([[5, 6, 7]])]
    first, second = queries.examples(batches, [1, 2, 0], size=2)
    assert first["input_ids"].tolist() == [[3, 4, 0], [5, 6, 7]] and second["input_ids"].tolist() == [[1, 2, 0]]
    assert first["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]] and first["labels"][0].tolist() == [3, 4, -100]
