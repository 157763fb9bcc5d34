"""mkdocs's hooks: pages and pictures outside docs/, and links as they are in the repository.

Links are written for the repository, where GitHub shows them: `../CONTRIBUTING.md` of a page in
docs/. In the site docs/ is the root, and what lies outside has its path in the repository.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "kernels/README.md", "csrc/README.md")
OUTSIDE = (*PAGES, "tests/README.md", "bench/evidence/*/*.png")
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/ under its path in the repository."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make each relative link one of the site."""
    source = page.file.src_uri
    inside = (ROOT / "docs" / source).is_file()  # else it is named by its place in the repository
    folder = PurePosixPath("docs" if inside else ".", source).parent

    def in_site(link: re.Match[str]) -> str:
        target = os.path.normpath(folder / link[2]).removeprefix("docs/")
        here = os.path.relpath(target, PurePosixPath(source).parent)
        return f"{link[1]}{here}{link[3] or ''})"

    return LINK.sub(in_site, markdown)
