"""MkDocs hooks: add files from outside docs/ to the site, and rewrite links between files."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# File of the repository -> page of the site.
PAGES = {
    "README.md": "overview.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "benchmarks/RESULTS.md": "benchmarks/RESULTS.md",
    "benchmarks/NOTES.md": "benchmarks/NOTES.md",
}
_SOURCES = {page: source for source, page in PAGES.items()}
_LINK = re.compile(r"(\]\()([^)#:\s]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of `PAGES` to the site."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files, **kwargs: object
) -> str:
    """Rewrites links between files of the repository as links between pages of the site."""
    uri = page.file.src_uri
    source = ROOT / _SOURCES.get(uri, f"docs/{uri}")

    def relink(match: re.Match[str]) -> str:
        target = (source.parent / match[2]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return match[0]  # mkdocs reports broken links
        name = str(target.relative_to(ROOT))
        linked = PAGES.get(name, name.removeprefix("docs/"))
        up = "../" * uri.count("/")
        return f"{match[1]}{up}{linked}{match[3] or ''})"

    # Links are rewritten outside of code blocks only.
    parts = _FENCE.split(markdown)
    fences = [*_FENCE.findall(markdown), ""]
    return "".join(_LINK.sub(relink, part) + code for part, code in zip(parts, fences, strict=True))
