"""Hooks of mkdocs: pages that lie outside of docs/, and an API page for each package of src.

Links are written for a reader of the repository; here they are turned into links of the site. `mkdocs build --strict`
refuses what leads nowhere.
"""

import os
import re
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HOME = Path(__file__).parents[1]
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "AGENTS.md", "benchmarks/README.md")  # pages that stay there
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
API = "api"


@cache
def packages() -> dict[str, list[str]]:
    """Package -> its modules that define something, from the files of src alone."""
    found: dict[str, list[str]] = {}
    for file in sorted((HOME / "src").rglob("*.py")):
        module = ".".join(file.relative_to(HOME).with_suffix("").parts).removesuffix(".__init__")
        if file.read_text(encoding="utf-8").strip():
            found.setdefault(module if file.stem == "__init__" else module.rpartition(".")[0], []).append(module)
    return found


def api_page(package: str, modules: list[str]) -> str:
    return "\n\n".join([f"# {package}", *(f"::: {module}" for module in modules)]) + "\n"


def in_site(path: Path) -> str | None:
    """Where a file of the repository is in the site, a module on its API page; None: it is not part of it."""
    name = path.relative_to(HOME).as_posix()
    if name in OUTSIDE:
        return name
    if path.is_relative_to(HOME / "src") and path.name != "__init__.py":
        return _on_api_page(".".join(path.relative_to(HOME).with_suffix("").parts))
    inside = path.is_relative_to(HOME / "docs") and path.is_file() and path.suffix != ".py"
    return path.relative_to(HOME / "docs").as_posix() if inside else None


def _on_api_page(name: str) -> str | None:
    for package, modules in packages().items():
        if name == package:
            return f"{API}/{package}.md"
        if name in modules:
            return f"{API}/{package}.md#{name}"
    return None


def followed(markdown: str, page: str) -> str:
    """The text of a page, with links for the site; a link to a file that is no page becomes its text."""
    home = HOME / page if page in OUTSIDE else HOME / "docs" / page

    def replaced(link: re.Match[str]) -> str:
        picture, text, target, anchor = link.groups()
        if not target or re.match(r"\w+:", target):
            return link[0]
        path = Path(os.path.normpath(home.parent / target))
        if not path.exists() or not path.is_relative_to(HOME):
            return link[0]
        place = in_site(path)
        if place is None:
            return str(text)
        relative = os.path.relpath(place, PurePosixPath(page).parent)
        return f"{picture}[{text}]({relative}{anchor or ''})"

    return LINK.sub(replaced, markdown)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation ends with the packages."""
    assert config.nav is not None, "mkdocs.yml has a nav"
    pages: list[Any] = [{package: f"{API}/{package}.md"} for package in packages()]
    config.nav = [*config.nav, {"API": pages}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(HOME / name)))
    for package, modules in packages().items():
        files.append(File.generated(config, f"{API}/{package}.md", content=api_page(package, modules)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    return followed(markdown, page.file.src_uri)
