"""The documentation: its code runs, its links lead somewhere, its messages are those that rellax gives."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from workspace import Workspace

import rellax

ROOT = Path(__file__).parents[1]
RUNNABLE = ("README.md", "docs/index.md", "docs/patch.md", "docs/training.md")
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
MESSAGE = re.compile(r"\*\*(``?)(.+?)\1\*\*")


def python_blocks(page: str) -> str:
    """All Python of a page, one block after another, where a failure's line number is the page's."""
    lines, inside = [], False
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        inside = line.startswith("```python") or (inside and not line.startswith("```"))
        lines.append(line if inside and not line.startswith("```") else "")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "module", sorted((ROOT / "rellax" / "reference").glob("[a-z]*.py")), ids=lambda path: path.stem
)
def test_the_maths_are_those_of_the_definitions(module: Path) -> None:
    _, maths = (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").split("\n", 1)
    assert maths.strip("\n") in (ROOT / "docs" / "maths.md").read_text(encoding="utf-8")


def stand_ins(page: str) -> dict[str, Any]:
    """What a page's code takes for granted."""
    if page == "README.md":
        ids = torch.randint(100, 300, (2, 9))
        ids[:, 3] = 49152
        labels = torch.full((2, 9), -100)
        labels[:, 8] = ids[:, 8] = torch.tensor([30, 31])
        return {
            "table": torch.randn(20, 6),
            "no_id": 30,
            "yes_id": 31,
            "ids": ids,
            "mask": torch.ones_like(ids),
            "labels": labels,
            "items": torch.tensor([[3], [19]]),
            "u": torch.randn(2, 64),
        }
    if page == "docs/training.md":
        model = transformers.AutoModelForCausalLM.from_pretrained("any")
        soft_prompt = rellax.SoftPromptConfig(torch.randn(20, 6), (350,))
        config = rellax.CFLoRAConfig(answer_ids=(30, 31))
        ids = torch.tensor([[5, 350, 6, 31, 7, 8, 350, 30]])
        return {
            "model": rellax.patch_model(model, config, soft_prompt=soft_prompt),
            "ids": ids,
            "ends": torch.tensor([0, 4, 8], dtype=torch.int32),
            "longest": 4,
            "items": torch.tensor([[3, 19]]),
            "u": torch.randn(2, 64),
            "labels": torch.where((ids == 30) | (ids == 31), ids, -100),
        }
    return {}


@pytest.mark.parametrize("page", RUNNABLE)
def test_code_runs(page: str, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny model in the place of whatever is loaded by name."""
    for auto_class in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        real = auto_class.from_pretrained

        def load(_: str, real: Any = real) -> Any:
            return real(workspace.model)

        monkeypatch.setattr(auto_class, "from_pretrained", load)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code = python_blocks(page)
    assert code.strip()
    exec(compile(code, str(ROOT / page), "exec"), stand_ins(page))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    """The pages of the site are checked when it is built; these two are read elsewhere as well."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8"))
    assert links
    assert not [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]


def test_the_site_is_built_without_warnings_and_needs_no_other(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert tmp_path / "api" / "ops.html" in pages
    loaded = re.compile(r"<(?:script|img|iframe)[^>]*src=\"?https?:|<link[^>]*stylesheet[^>]*https?:")
    assert not [page for page in pages if loaded.search(page.read_text(encoding="utf-8"))]


def test_messages_of_the_troubleshooting_page_exist() -> None:
    """A message with … for what differs: each part of it stands in rellax, in the source's own words."""
    said = {
        node.value
        for path in (ROOT / "rellax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    said |= {path.read_text(encoding="utf-8") for path in (ROOT / "csrc").glob("*.cpp")}
    messages = [message for _, message in MESSAGE.findall(TROUBLESHOOTING.read_text(encoding="utf-8"))]
    assert len(messages) > 15
    parts = {part.strip("` ") for message in messages for part in message.split("…")}
    assert not [part for part in parts if not any(part in words for words in said)]
