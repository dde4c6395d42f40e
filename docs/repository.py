"""Lets mkdocs show files outside of docs/, where people look for them in the repository, as pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/results/*.md", "benchmarks/results/*.png")


def on_files(files: Files, config: Any) -> Files:
    """Each file under its path from the repository's root."""
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between docs/ and the rest of the repository, as links within the site, whose root is docs/."""
    return (
        markdown.replace("](../", "](").replace("](docs/", "](") if "/" not in page.file.src_uri else markdown
    )
