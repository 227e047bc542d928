"""Runs every ```python block of the top-level guides, in order, one namespace per guide, nothing skipped.

The blocks run in a temporary folder that holds links to `model_cards/` and `examples/`: relative paths into these two
read exactly as they do at the repository root, and whatever a block saves (`save_pretrained("smoothed-llava")`, an
image, a results file) stays in the temporary folder. A block therefore reads from `model_cards/...` or `examples/...`
and writes anywhere else. Tracebacks carry the guide's own line numbers.
"""

import re
from pathlib import Path

import pytest

from fs_psm_hf import SmoothedVisionTower, SmoothedVisionTowerConfig


ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("guide", ["README.md", "CONTRIBUTING.md"])
def test_python_blocks_run(guide, tmp_path, monkeypatch):
    text = (ROOT / guide).read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks
    assert len(blocks) == text.count("```python"), "a block is indented or not closed and would not run"

    for folder in ("model_cards", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder, target_is_directory=True)
    monkeypatch.chdir(tmp_path)

    # One block asks for exported code, which is a setting of the classes.
    for cls in (SmoothedVisionTower, SmoothedVisionTowerConfig):
        monkeypatch.setattr(cls, "_auto_class", None)
    namespace = {"__name__": guide}
    for block in blocks:
        padding = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(padding + block[1], guide, "exec"), namespace)
