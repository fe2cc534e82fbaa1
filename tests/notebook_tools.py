"""Execute notebooks and stamp them, or list the stale ones.

    python tests/notebook_tools.py run notebooks/06*.ipynb    # `make notebooks`
    python tests/notebook_tools.py stale                      # `make stale`

A stamp holds the hash of what the notebook's outputs came from: its own code cells, and helpers/. Prose may be mended
afterwards, and so may comments and docstrings in helpers/; any other change makes the notebook stale.
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

COMMANDS = ("run.py", "queries.py", "explorer.py", "explorer.html")  # no notebook imports them


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


def helpers_hash(folder=ROOT / "helpers"):
    """Hash of the package and its data, without Markdown and what only the commands use."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    paths = [path for path in paths if path.name not in COMMANDS and path.suffix not in (".md", ".pyc")]
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
    bundled = all(os.environ.get(key, "") in ("", "bundled") for key in ("TINYSTORIES", "STORIES"))
    env = {key: value for key, value in os.environ.items() if key != "FAST"} | QUIET
    where = ["--inplace"] if bundled else ["--output-dir", str(ROOT / "out")]
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", *where, "--log-level=WARN"]
    command += [f"--ExecutePreprocessor.{option}" for option in
                ("record_timing=False", "timeout=-1", "kernel_name=python3")]
    failed = []
    for path in paths:
        began, helpers = time.perf_counter(), helpers_hash()
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
    helpers = helpers_hash()
    for path in paths:
        why = staleness(nbformat.read(path, as_version=4), helpers)
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
