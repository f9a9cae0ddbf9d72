"""The code of docs/checkpoints.md runs as it stands."""

import pathlib
import re

import pytest

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "checkpoints.md"


@pytest.mark.optax
@pytest.mark.slow(reason="compiles a training step and generates; tests/hub has what it shows")
def test_examples(monkeypatch, tmp_path):
    monkeypatch.chdir(PAGE.parents[1])
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        exec(code.replace("/tmp/fine-tuned", str(tmp_path)), names)
    assert names["tokens"].shape == (1, 20)
    assert (tmp_path / "generation_config.json").exists()
