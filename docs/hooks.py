"""What mkdocs does beside building ``docs/``: pages from files of the repository's root, links that leave the site."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)#]*)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose source isn't in ``docs/``."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=_within_site((ROOT / source).read_text(), ROOT)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Take out of a page of ``docs/`` the links that leave it."""
    return _within_site(markdown, ROOT / "docs")


def _within_site(markdown: str, folder: Path) -> str:
    """Point links of a file in ``folder`` at pages of the site; those that lead elsewhere become their text."""

    def replace(link: re.Match) -> str:
        text, target, anchor = link[1], (folder / link[2]).resolve(), link[3] or ""
        for page, source in PAGES.items():
            if target in (ROOT / source, ROOT / "docs" / page):
                return f"[{text}]({page}{anchor})"
        if target.is_file() and target.is_relative_to(ROOT / "docs") and target.suffix in {".md", ".png", ".jpg"}:
            return f"[{text}]({target.relative_to(ROOT / 'docs')}{anchor})"
        return text

    return LINK.sub(replace, markdown)
