"""Execute notebooks and stamp them, or list the stale ones.

    python tests/notebook_tools.py run notebooks/06*.ipynb    # `make notebooks`
    python tests/notebook_tools.py stale                      # `make stale`

A stamp holds the hash of what the notebook's outputs came from: its own code cells, and of helpers/ the modules that it
imports, directly or by way of others, with the bundled data where they are read. Prose may be mended afterwards, and so
may comments and docstrings in helpers/; any other change makes the notebook stale.
"""

import ast
import hashlib
import io
import os
import subprocess
import sys
import time
import tokenize
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
         "JUPYTER_PREFER_ENV_PATH": "1", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip

def code_only(text):
    """Python source without comments, docstrings and blank lines."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        first = node.body[0] if isinstance(getattr(node, "body", None), list) and node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            if lines[first.lineno - 1].lstrip()[:1] in "'\"rR":  # not `def f(): "text"` on one line
                lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def source_hash(notebook):
    """Hash of a notebook's code cells."""
    return _hash(cell.source for cell in notebook.cells if cell.cell_type == "code")


def imported(tree, folder, public):
    """Names of the modules of helpers that a syntax tree imports; `public` says where helpers' own names come from."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").split(".")[0] == "helpers"):
            inside = node.module if node.level else (node.module or "").partition(".")[2]
            names = [alias.name for alias in node.names]
            found |= {inside.split(".")[0]} if inside else {public.get(name, name) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("helpers.")}
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "helpers":
            found.add(public.get(node.attr, node.attr))
    return {name for name in found if (folder / f"{name}.py").exists()}


def modules_of(notebook, folder):
    """The modules of helpers that a notebook rests on, sorted."""
    read = lambda name: ast.parse((folder / f"{name}.py").read_text("utf-8"))
    public = {alias.name: node.module for node in ast.walk(read("__init__")) if isinstance(node, ast.ImportFrom)
              for alias in node.names}
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    found, open_ = set(), imported(ast.parse(code), folder, public)
    while open_:
        found |= open_
        open_ = set().union(*(imported(read(name), folder, public) for name in open_)) - found
    return sorted(found)


def helpers_hash(notebook, folder=ROOT / "helpers"):
    """Hash of what a notebook uses of helpers: code of modules, the figures' style, and, where `sources` is, the data;
    of the bundled checkpoints those that its code names."""
    modules, code = modules_of(notebook, folder), "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    paths = [folder / f"{name}.py" for name in modules] + sorted(folder.glob("*.mplstyle"))
    if "sources" in modules:
        paths += sorted(path for path in (folder / "bundled").rglob("*") if path.is_file()
                        and path.suffix not in (".py", ".md", ".pyc") and path.parent.name != "grammar"
                        and (path.parent.parent.name != "checkpoints" or path.parent.name in code))
    texts = [code_only(path.read_text("utf-8")) if path.suffix == ".py" else path.read_bytes() for path in paths]
    names = [path.relative_to(folder).as_posix() for path in paths]
    return _hash(part for pair in zip(names, texts, strict=True) for part in pair)


def _hash(parts):
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:16]


def stamp(notebook, helpers):
    """Write both hashes into the metadata, and there only what does not change from machine to machine."""
    notebook.metadata = nbformat.NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python", "pygments_lexer": "ipython3", "file_extension": ".py"},
        stamp={"source": source_hash(notebook), "helpers": helpers},
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    return notebook


def staleness(notebook, helpers):
    """Why a notebook is stale, or None."""
    got = notebook.metadata.get("stamp")
    if not got:
        return "has never been run by make notebooks"
    if got["source"] != source_hash(notebook):
        return "its own code changed since it ran"
    return "helpers changed since it ran" if got["helpers"] != helpers else None


def run(paths):
    """Execute notebooks in place, in full mode, and stamp them; with another source than bundled, into out/ instead."""
    bundled = all(os.environ.get(key, "") in ("", "bundled") for key in ("TINYSTORIES", "STORIES", "SENTIMENT"))
    env = {key: value for key, value in os.environ.items() if key != "FAST"} | QUIET
    where = ["--inplace"] if bundled else ["--output-dir", str(ROOT / "out")]
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", *where, "--log-level=WARN"]
    command += [f"--ExecutePreprocessor.{option}" for option in
                ("record_timing=False", "timeout=-1", "kernel_name=python3")]
    failed = []
    for path in paths:
        began, helpers = time.perf_counter(), helpers_hash(nbformat.read(path, as_version=4))
        done = subprocess.run([*command, str(path)], env=env)
        took = time.perf_counter() - began
        print(f"{path}: {took:.0f} s" + ("" if done.returncode == 0 else ", FAILED"), flush=True)
        if done.returncode:
            failed.append(path)
        elif bundled:
            nbformat.write(stamp(nbformat.read(path, as_version=4), helpers), path)
    return 1 if failed else 0


def stale(paths):
    """Print the stale notebooks, one a line with the reason; nothing if all is well."""
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        why = staleness(notebook, helpers_hash(notebook))
        if why:
            print(f"{path}: {why}")
    return 0


if __name__ == "__main__":
    commands = {"run": run, "stale": stale}
    if sys.argv[1:2] == [] or sys.argv[1] not in commands:
        sys.exit(__doc__)
    given = [Path(name) for name in sys.argv[2:]] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    missing = [str(path) for path in given if not path.is_file()]
    sys.exit(f"no such notebook: {', '.join(missing)}" if missing else commands[sys.argv[1]](given))
