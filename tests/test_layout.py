"""What a newcomer meets first: a small top level, small files and functions, pinned requirements."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = {".ci", ".gitattributes", ".gitignore", "LICENSE", "Makefile", "README.md", "figures", "helpers", "notebooks",
       "pyproject.toml", "requirements.txt", "tests"}  # fmt: skip
MODULES = sorted((ROOT / "helpers").glob("*.py"))


def test_the_top_level_has_nothing_else():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in listing.stdout.splitlines()} <= TOP


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_helpers_are_thin(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 250, f"{path.name} has {len(text.splitlines())} lines"
    tree = ast.parse(text)
    for node in tree.body:
        public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        if public and path.name != "run.py":
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            doc = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            assert lines - doc <= 30, f"{path.name}: {node.name} has {lines - doc} lines beside its docstring"
            assert node.args.kwarg is None, f"{path.name}: {node.name} takes **{node.args.kwarg.arg}"


def test_requirements_are_pinned_and_explained():
    lines = [line for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines() if line.strip()]
    pins = [line for line in lines if not line.startswith("#")]
    assert pins[0].startswith("torch==2.13.0") and pins[-1] == "-e ."
    for line in pins[:-1]:
        assert re.fullmatch(r"[\w-]+==[\w.]+ +# .{5,}", line), f"not a pin with its reason: {line!r}"
