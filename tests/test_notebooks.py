"""House style of the committed notebooks, read from their JSON: nothing is executed here.

`pytest --nbmake notebooks` (part of `make test`) executes them; these tests hold what a reader sees on a code host.
"""

import base64
import re
from pathlib import Path

import nbformat
import notebook_tools
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SAVED = re.compile(r"""save_figure\(.*?,\s*["']([\w-]+)["']\)""")
LINK = re.compile(r"""\]\(([^)\s#]+)|(?:src|href)=["']([^"'#]+)""")
PROGRESS = re.compile(r"\d+%\||\d(it/s|s/it)\b|\r")
UNWANTED = re.compile(r"/work/|/root/|/home/|/Users/|/tmp/|\.\./shared|\bTODO\b|\bFIXME\b|\bXXX\b")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def lines_of(cell):
    """Lines of code: blank ones and comments do not count."""
    return [line for line in cell.source.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def output_texts(notebook):
    """Every text of every output: streams, and the text, HTML and so on of displays, without pictures."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            yield output.get("text", "")
            for kind, data in output.get("data", {}).items():
                if not kind.startswith("image/"):
                    yield str(data)


def saved_figures(notebook):
    return {name for cell in code_cells(notebook) for name in SAVED.findall(cell.source)}


def test_is_valid_and_below_a_megabyte(path, notebook):
    nbformat.validate(notebook)
    assert path.stat().st_size < 1_000_000, f"{path.name} has {path.stat().st_size:,} bytes; smaller or fewer pictures"


def test_ran_once_in_order(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), f"execution counts {counts}: run it with `make notebooks`"
    assert all(cell.source.strip() for cell in notebook.cells), "an empty cell"


def test_its_code_did_not_change_since_it_ran(notebook):
    why = notebook_tools.staleness(notebook, notebook.metadata.get("stamp", {}).get("helpers"))
    assert why is None, f"{why}: run it with `make notebooks`"
    assert notebook.metadata.kernelspec.name == "python3"


def test_outputs_are_clean(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error", output
            assert output.get("name") != "stderr", f"stderr: {output.text[:300]}"
    for text in output_texts(notebook):
        assert not PROGRESS.search(text), f"a progress bar: {text[:200]!r}"


def test_no_paths_of_a_machine_and_nothing_unfinished(notebook):
    for text in [*(cell.source for cell in notebook.cells), *output_texts(notebook)]:
        found = UNWANTED.search(text)
        assert not found, f"{found[0]!r} in {text[max(0, found.start() - 60) : found.end() + 60]!r}"


def test_sizes(notebook):
    cells, code = len(notebook.cells), code_cells(notebook)
    assert 25 <= cells <= 45, f"{cells} cells; 25 to 45 make one sitting"
    total = sum(len(lines_of(cell)) for cell in code)
    assert total <= 250, f"{total} lines of code; at most 250"
    for cell in code:
        check = "check_close(" in cell.source or "assert " in cell.source
        assert check or len(lines_of(cell)) <= 25, f"{len(lines_of(cell))} lines in the cell\n{cell.source[:200]}"


def test_opens_with_title_question_time_and_neighbours(path, notebook):
    opening = "\n\n".join(cell.source for cell in notebook.cells[:3] if cell.cell_type == "markdown")
    assert notebook.cells[0].cell_type == "markdown" and opening.startswith("# "), "the first cell is the title"
    assert "?" in opening, "the opening asks the question that the notebook answers"
    assert re.search(r"\b(minutes?|seconds?|min|s)\b", opening), "the opening states the measured run time"
    text = prose(notebook).lower()
    number = path.stem[:2]
    if number.isdigit():
        assert ("next" in text or number == "12") and ("previous" in text or number == "01"), "links previous and next"


def test_settings_hold_every_size(notebook):
    pickers = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and "pick(" in cell.source]
    assert len(pickers) == 1, f"pick(full, fast=…) belongs into one Settings cell, found in {len(pickers)} cells"
    near = "\n".join(cell.source for cell in notebook.cells[max(0, pickers[0] - 1) : pickers[0] + 1])
    assert "Settings" in near, "the cell with pick(...) is called Settings, in its first line or in the prose above it"
    for cell in code_cells(notebook):
        for word in ("FAST", "sys.path", "%pip", "!pip", "if CI"):
            assert word not in cell.source, f"{word} in a cell: fast mode is pick's, the install is make's"


def test_has_the_parts_of_a_notebook(notebook):
    text = prose(notebook)
    lower = text.lower()
    assert re.search(r"^\|.*symbol", text, re.I | re.M), "a notation table: symbol, name in code, shape, meaning"
    assert "$$" in text and re.search(r"\\tag\{\d+", text), "numbered equations, $$ … \\tag{1} $$"
    assert any("check_close(" in cell.source for cell in code_cells(notebook)), "a check cell"
    for part in ("does it work?", "negative control", "summary", "limitation", "exercise", "references"):
        assert part in lower, f"no {part!r}"
    folded = len(re.findall(r"<details>", text))
    assert folded in (2, 3) and folded == text.count("</details>"), f"2 or 3 exercises with folded solutions: {folded}"
    references = text[lower.rindex("references") :]
    assert re.search(r"arxiv|https?://|doi", references, re.I), "references name a paper that can be found"


def test_saves_figures_that_are_committed(notebook):
    saved = saved_figures(notebook)
    assert saved, 'no save_figure(fig, "name") with the name as it is'
    missing = [name for name in sorted(saved) if not (ROOT / "figures" / f"{name}.png").exists()]
    assert not missing, f"figures/ lacks {missing}: run `make notebooks`"
    shown = [base64.b64decode(data) for cell in code_cells(notebook) for output in cell.outputs
             if (data := output.get("data", {}).get("image/png"))]  # fmt: skip
    assert shown, "no picture among the outputs"


def test_links_lead_somewhere(path, notebook):
    broken = [link for link in links(prose(notebook)) if not (path.parent / link).exists()]
    assert not broken, f"{path.name} links to {broken}, which do not exist"


def links(text):
    """Relative targets of Markdown and HTML links and pictures."""
    found = [first or second for first, second in LINK.findall(text)]
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def test_readme_names_every_notebook_and_what_it_names_exists():
    text = (ROOT / "README.md").read_text("utf-8")
    unnamed = [path.name for path in NOTEBOOKS if f"notebooks/{path.name}" not in text]
    assert not unnamed, f"README.md does not link {unnamed}"
    named = set(links(text)) | set(re.findall(r"\b(?:notebooks|figures)/[\w-]+\.\w+", text))
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing, f"README.md names {missing}, which do not exist"
    assert not UNWANTED.search(text), UNWANTED.search(text)


def test_every_figure_belongs_to_a_notebook():
    saved = set().union(*(saved_figures(nbformat.read(path, as_version=4)) for path in NOTEBOOKS))
    orphans = sorted(path.name for path in (ROOT / "figures").glob("*.png") if path.stem not in saved | {"explorer"})
    assert not orphans, f"no notebook saves {orphans}"


# The tools these tests and `make stale` rest on.


def small_notebook(code, text="# Title"):
    cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell(code)]
    return notebook_tools.stamp(nbformat.v4.new_notebook(cells=cells), "h1")


def test_staleness_follows_code_and_helpers_not_prose():
    notebook = small_notebook("x = 1")
    assert notebook_tools.staleness(notebook, "h1") is None
    assert "helpers changed" in notebook_tools.staleness(notebook, "h2")
    notebook.cells[0].source = "# Another title"
    assert notebook_tools.staleness(notebook, "h1") is None
    notebook.cells[1].source = "x = 2"
    assert "its own code" in notebook_tools.staleness(notebook, "h1")
    del notebook.metadata["stamp"]
    assert "never" in notebook_tools.staleness(notebook, "h1")


def test_moving_code_between_cells_changes_the_hash():
    one = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in ("a = 1", "b = 2")])
    two = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("a = 1b = 2")])
    assert notebook_tools.source_hash(one) != notebook_tools.source_hash(two)


def test_helpers_hash_sees_imported_code_and_data_but_not_comments(tmp_path):
    (tmp_path / "bundled").mkdir()
    (tmp_path / "__init__.py").write_text("from .sources import load\nfrom .a import f", "utf-8")
    (tmp_path / "sources.py").write_text("load = 1", "utf-8")
    (tmp_path / "c.py").write_text("c = 1", "utf-8")

    def digest(code, data=b"1", notebook="from helpers import f, load"):
        (tmp_path / "a.py").write_text(code, "utf-8")
        (tmp_path / "bundled" / "b.gz").write_bytes(data)
        return notebook_tools.helpers_hash(small_notebook(notebook), tmp_path)

    base = digest('"""One."""\n\ndef f(x):\n    """Two."""\n    return x + 1  # why\n')
    assert digest('"""Uno,\ndue."""\ndef f(x):\n    """Tre."""\n\n    return x + 1\n') == base
    assert digest("def f(x):\n    return x + 2\n") != base
    assert digest("def f(x):\n    return x + 1\n", data=b"2") != base
    for inert in ("run.py", "README.md"):
        (tmp_path / inert).write_text("print(1)", "utf-8")
    assert digest("def f(x):\n    return x + 1\n") == base

    (tmp_path / "bundled" / "checkpoints" / "early").mkdir(parents=True)
    early = tmp_path / "bundled" / "checkpoints" / "early" / "model"
    named = "from helpers import f, load\nload('early')"
    early.write_bytes(b"1")
    assert digest("def f(x):\n    return x + 1\n") == base, "a checkpoint that the notebook does not name"
    with_it = digest("f = 1", notebook=named)
    early.write_bytes(b"2")
    assert digest("f = 1", notebook=named) != with_it

    alone = "from helpers.a import f"  # neither the data nor another module
    first = digest("f = 1", notebook=alone)
    assert digest("f = 1", data=b"2", notebook=alone) == first
    through = digest("from .c import c as f", notebook=alone)
    (tmp_path / "c.py").write_text("c = 2", "utf-8")
    assert digest("from .c import c as f", notebook=alone) != through
    assert notebook_tools.modules_of(small_notebook("import helpers\nhelpers.f(1)"), tmp_path) == ["a", "c"]
    assert notebook_tools.modules_of(small_notebook("import torch"), tmp_path) == []
