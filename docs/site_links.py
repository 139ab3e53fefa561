"""A hook of mkdocs: takes into the site what pages link to outside of this folder.

Pages link to records of benchmarks, examples and the like by paths that work in the repository,
``../benchmarks/results/tolerance.md`` say. In the site these files lie beside the pages, so the
links lose their ``../``. A link to a file that does not exist is left to mkdocs to complain about.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the linked files, those that they link to themselves, and so on."""
    root = Path(config.config_file_path).parent
    docs = Path(config.docs_dir)
    pages = [docs / page.src_uri for page in files.documentation_pages()]
    while pages:
        source = pages.pop()
        for link in _LINK.finditer(source.read_text()):
            target = Path(posixpath.normpath(source.parent / link["path"]))
            if target.is_relative_to(docs) or not target.is_file():
                continue
            uri = target.relative_to(root).as_posix()
            if uri in files.src_uris:
                continue
            files.append(File.generated(config, uri, abs_src_path=str(target)))
            if target.suffix == ".md":
                pages.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links that lead out of the folder of pages into links inside the site."""
    folder = posixpath.dirname(page.file.src_uri)

    def inside(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link["path"]))
        # A page of the repository's root links to pages by the name of their folder.
        path = path.removeprefix("../").removeprefix("docs/")
        if files.get_file_from_path(path) is None:
            return link[0]
        return posixpath.relpath(path, folder or ".") + (link["anchor"] or "")

    return _LINK.sub(inside, markdown)
