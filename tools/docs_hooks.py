"""What the documentation is built with beside the pages in docs/ (mkdocs.yml names this file as a hook).

Made at every build, so that it cannot go stale: the command line, from every command's own --help; the changelog and
CONTRIBUTING.md, from the files of the repository; a page for each file of the repository that a page links to. So a
link out of docs/ works in a git viewer as it stands, and here leads to that page. A link to what is not there is left
alone: `mkdocs build --strict` refuses it.
"""

import contextlib
import io
import json
import os
import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
INCLUDED = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
"""Pages that are files of the repository."""
COMMAND_LINE = "reference/cli.md"
HELP_COLUMNS = "88"

LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")
LANGUAGES = {".py": "python", ".json": "json", ".yaml": "yaml", ".sh": "sh"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made here."""
    for uri, path in INCLUDED.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, COMMAND_LINE, content=command_line()))
    linked = {path for file in files.documentation_pages() for path in linked_files(file.src_uri, file.content_string)}
    for path in sorted(linked):
        page = File.generated(config, page_of(path), content=listing(path), inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 (MkDocs' names)
    """Leads links to files of the repository to their pages."""
    return led(markdown, page.file.src_uri)


def led(markdown: str, uri: str) -> str:
    """The page at `uri` with its links to files of the repository leading to their pages."""

    def target(link: re.Match[str]) -> str:
        path = repository_path(uri, link[1])
        is_there = path in INCLUDED.values() or (ROOT / path).is_file()
        return posixpath.relpath(page_of(path), posixpath.dirname(uri) or ".") if is_there else link[1]

    return LINK.sub(target, markdown)


def linked_files(uri: str, markdown: str) -> Iterator[str]:
    """The files of the repository outside docs/ that the page links to and that have no page yet."""
    for link in LINK.findall(markdown):
        path = repository_path(uri, link)
        inside = path.startswith("docs/") or path in INCLUDED.values()
        if not inside and not path.startswith("..") and (ROOT / path).is_file():
            yield path


def repository_path(uri: str, link: str) -> str:
    """The path in the repository that a link on the page at `uri` means."""
    source = INCLUDED.get(uri, f"docs/{uri}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def page_of(path: str) -> str:
    """Where a file of the repository is in the site."""
    pages = {included: uri for uri, included in INCLUDED.items()}
    if path in pages:
        return pages[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}.md"


def listing(path: str) -> str:
    """A page that shows a file of the repository; it is left out of the search."""
    text = (ROOT / path).read_text(encoding="utf-8").rstrip()
    is_notebook = path.endswith(".ipynb")
    body = notebook(text) if is_notebook else fenced(text, LANGUAGES.get(Path(path).suffix, "text"))
    return f"---\ntitle: {path}\nsearch: {{exclude: true}}\n---\n\n`{path}`\n\n{body}\n"


def notebook(text: str) -> str:
    """The cells of a notebook, without what they printed."""
    cells = json.loads(text)["cells"]
    parts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join(fenced(source, "python") if kind == "code" else source for kind, source in parts)


def fenced(text: str, language: str) -> str:
    """A block of code."""
    return f"~~~~~~{language}\n{text}\n~~~~~~"


def command_line() -> str:
    """The page with every command's help."""
    from poa.cli.data import COMMANDS as DATA
    from poa.cli.evaluate import COMMANDS as TABLES
    from poa.cli.evaluate import PROTOCOLS
    from poa.cli.main import COMMANDS

    groups = {"data": DATA, "evaluate": PROTOCOLS | TABLES}
    commands: dict[str, str] = {}
    for name, text in COMMANDS.items():
        named = {f"{name} {part}": words for part, words in groups.get(name, {}).items()}
        commands |= named or {name: text}
    sections = "\n".join(f"## poa {name}\n\n{fenced(help_of(name), 'text')}\n" for name in commands)
    table = "\n".join(f"| [`poa {name}`](#poa-{name.replace(' ', '-')}) | {text} |" for name, text in commands.items())
    return f"# Command line\n\n| command | what it does |\n| --- | --- |\n{table}\n\n{sections}"


def help_of(command: str) -> str:
    """What the command prints when asked for help."""
    from poa.cli.main import main

    printed = io.StringIO()
    width = mock.patch.dict(os.environ, {"COLUMNS": HELP_COLUMNS})
    with width, contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    lines = (part for line in printed.getvalue().splitlines() for part in wrapped(line.rstrip()))
    return "\n".join(lines).strip()


def wrapped(line: str) -> list[str]:
    """The line in pieces that fit; tyro leaves a command's description as it is."""
    return textwrap.wrap(line, int(HELP_COLUMNS)) or [""]
