"""The code of README.md runs as it is printed, with the bundled model in the place of the reader's."""

import json
import re
from pathlib import Path

from helpers.sources import BUNDLED

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    story = "Once upon a time, there was a cat named {}. The cat sat on the mat."
    lines = [json.dumps({"text": story.format("Tom" * n)}) for n in range(1, 13)]
    (tmp_path / "my_texts.jsonl").write_text("\n".join(lines), "utf-8")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    assert len(blocks) == 2
    names = {}
    own = blocks[0].replace('"gpt2"', repr(str(BUNDLED / "model")))
    assert own != blocks[0] and len([line for line in own.splitlines() if line.strip()]) <= 20
    exec(own, names)
    assert names["scores"].shape == (1, 12) and names["by_token"].shape[:2] == (1, 10)
    assert len(capsys.readouterr().out.splitlines()) == 10 and (tmp_path / "factors").exists()
    exec(blocks[1], names)
    assert names["scores"].shape == (16, 64)
