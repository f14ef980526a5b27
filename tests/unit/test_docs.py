"""The documentation: what it names exists, what exists is in it, and a broken link ends the build."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import yaml
from markdown.extensions.toc import slugify
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

import poa
from poa.backbones import architecture
from poa.cli.data import COMMANDS as DATA
from poa.cli.evaluate import COMMANDS as TABLES
from poa.cli.evaluate import PROTOCOLS
from poa.cli.main import COMMANDS, main
from poa.config import load_recipe, recipe_names
from poa.elastic import num_params

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
PACKAGES = ("poa.evaluate", "poa.deploy.profile", "poa.deploy.select", "poa.deploy.report", "poa.embed")
GROUPS = {"data": DATA, "evaluate": PROTOCOLS | TABLES}
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

sys.path.insert(0, str(ROOT / "tools"))
import docs_hooks  # noqa: E402 (tools/ is no package)


def nav_pages():
    def flat(entry):
        if isinstance(entry, str):
            return [entry]
        entries = entry.values() if isinstance(entry, dict) else entry
        return [page for one in entries for page in flat(one)]

    return flat(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])


def blocks(text, language):
    """What stands in the blocks of code in that language."""
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def shell_commands(text):
    """The lines of all `sh` blocks, continued ones joined, without comments."""
    lines = [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [re.sub(r"\s#.*", "", line).strip() for line in lines]


def commands(text):
    """Every call of `poa` in `sh` blocks, as words."""
    calls = [part.split() for line in shell_commands(text) for part in re.split(r"&&|;|\|", line)]
    return [words[1:] for words in calls if words[:1] == ["poa"] and len(words) > 1]


class TestWhatExistsIsDocumented:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_command_is_shown_in_a_page_of_the_navigation(self, name):
        pages = [DOCS / page for page in nav_pages() if (DOCS / page).is_file()]
        assert any(call[0] == name for page in pages for call in commands(page.read_text(encoding="utf-8")))

    def test_the_command_line_page_has_the_help_of_every_command(self):
        page = docs_hooks.command_line()
        grouped = [f"{group} {name}" for group, names in GROUPS.items() for name in names]
        for name in [*(set(COMMANDS) - set(GROUPS)), *grouped]:
            assert f"\n## poa {name}\n" in page
            assert f"usage: poa {name} " in page
        assert "reference/cli.md" in nav_pages()

    @pytest.mark.parametrize("name", poa.__all__)
    def test_every_public_name_is_in_the_reference(self, name):
        text = (DOCS / "reference" / "poa.md").read_text(encoding="utf-8")
        assert f"::: poa.{name}\n" in text or f"`poa.{name}`" in text

    @pytest.mark.parametrize("package", PACKAGES)
    def test_every_public_name_of_a_package_is_in_the_reference(self, package):
        text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
        assert f"::: {package}\n" in text
        folder = ROOT / "src" / package.replace(".", "/")
        hidden = [name for name in importlib.import_module(package).__all__ if (folder / f"{name}.py").exists()]
        # A module of the same name hides the function from mkdocstrings.
        assert [name for name in hidden if f"::: {package}.{name}.{name}\n" not in text] == []

    def test_every_page_is_in_the_navigation(self):
        made = {"reference/cli.md", *docs_hooks.INCLUDED}
        assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} | made == set(nav_pages())


class TestWhatIsDocumentedExists:
    def test_every_option_of_a_shown_command_is_one(self, capsys):
        helps = {}
        for page in PAGES:
            for words in commands(page.read_text(encoding="utf-8")):
                options = [word.split("=")[0] for word in words if re.match(r"--[a-z]", word)]
                call = self.call(words)
                if call not in helps:
                    helps[call] = self.help(call, capsys)
                unknown = [option for option in options if not re.search(rf"{option}\b", helps[call])]
                assert not unknown, f"{page.name}: poa {' '.join(words)}"

    @staticmethod
    def call(words):
        """The command that the words call, with the recipe, which decides on the model's options."""
        name = words[:2] if words[0] in GROUPS else words[:1]
        recipe = words.index("--recipe") if "--recipe" in words else len(words)
        return (*name, *words[recipe : recipe + 2])

    @staticmethod
    def help(call, capsys):
        with pytest.raises(SystemExit) as stopped:
            main([*call, "--help"])
        assert stopped.value.code in (0, None)
        return capsys.readouterr().out

    @pytest.mark.parametrize("page", PAGES, ids=NAMES)
    def test_results_scripts_and_tests_that_a_page_names_are_there(self, page):
        text = page.read_text(encoding="utf-8")
        pattern = r"(?:benchmarks|examples|tools)/[\w./-]+\.(?:json|py|yaml|ipynb)|tests/[\w/]+(?:\.py)?"
        assert [path for path in re.findall(pattern, text) if not (ROOT / path).exists()] == []

    @pytest.mark.parametrize("page", PAGES, ids=NAMES)
    def test_what_python_examples_import_from_poa_exists(self, page):
        for block in blocks(page.read_text(encoding="utf-8"), "python"):
            for module, names in re.findall(r"^from (poa[\w.]*) import ([\w, ]+)", block, re.MULTILINE):
                found = importlib.import_module(module)
                assert [name for name in names.split(", ") if not hasattr(found, name.strip())] == []

    def test_code_and_tests_of_the_paper_map_exist(self):
        table = (DOCS / "paper-map.md").read_text(encoding="utf-8")
        rows = re.findall(r"^\|.*\|(.*)\|(.*)\|$", table, re.MULTILINE)[2:]
        assert len(rows) > 15
        for code, held_by in rows:
            for entry in re.findall(r"`([^`]+)`", code):
                self.check_code(entry)
            folder = "tests"
            for path in re.findall(r"`([^`]+)`", held_by):
                folder = str(Path(path).parent) if "/" in path else folder
                assert (ROOT / (path if "/" in path else f"{folder}/{path}")).exists(), path

    def test_sizes_in_the_table_of_recipes_are_those_of_the_recipes(self):
        text = (DOCS / "recipes.md").read_text(encoding="utf-8")
        rows = re.findall(
            r"^\| `([\w-]+)` \| (\d+) .*?\| (w[\w-]+), (.*?) \| (w[\w-]+).*?, (.*?) \|$", text, re.MULTILINE
        )
        assert {row[0] for row in rows} == set(recipe_names())
        for name, count, *ends in rows:
            model = load_recipe(name).model
            kind = architecture(model.architecture)
            space, layout = kind.space(model), kind.layout(model)
            assert int(count) == len(space)
            for subnet, words, written in zip((space.smallest, space.intact), ends[::2], ends[1::2], strict=True):
                number, unit = written.split()[:2]
                size = num_params(layout, subnet) / {"k": 1e3, "M": 1e6}[unit]
                assert (words, number) == (str(subnet), f"{size:.1f}" if unit == "M" else f"{size:.0f}"), name

    @staticmethod
    def check_code(entry):
        """`family.py: Family.extract, load`: the file is there and the names are in it."""
        path, _, names = entry.partition(": ")
        found = list((ROOT / "src/poa").glob(path))
        assert found, entry
        module = importlib.import_module("poa." + path.removesuffix(".py").replace("/", ".")) if names else None
        holder = module
        for name in filter(None, names.split(", ")):
            *outer, last = name.split(".")
            for part in outer:
                holder = getattr(module, part)
            assert hasattr(holder, last), entry


def built(tmp_path, markdown):
    """Builds a site of one page as mkdocs.yml says."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(markdown, encoding="utf-8")
    options = {"docs_dir": str(docs), "site_dir": str(tmp_path / "site"), "plugins": [], "extra_css": [], "watch": []}
    build(load_config(str(ROOT / "mkdocs.yml"), nav=[{"Home": "index.md"}], hooks=[], **options))
    return (tmp_path / "site" / "index.html").read_text(encoding="utf-8")


class TestLinks:
    def test_sound_links_build(self, tmp_path):
        assert "Where" in built(tmp_path, "# Home\n\n[here](#home) [this page](index.md#where)\n\n## Where\n")

    @pytest.mark.parametrize("link", ["gone.md", "#gone", "index.md#gone", "../benchmarks/gone.json", "/index.md"])
    def test_a_broken_link_ends_the_build(self, tmp_path, link):
        with pytest.raises(Abort):
            built(tmp_path, f"# Home\n\n[there]({link})\n")

    def test_a_page_outside_the_navigation_ends_the_build(self, tmp_path):
        (tmp_path / "docs").mkdir()
        (tmp_path / "docs" / "stray.md").write_text("# Stray\n", encoding="utf-8")
        with pytest.raises(Abort):
            self.build_beside(tmp_path)

    @staticmethod
    def build_beside(tmp_path):
        (tmp_path / "docs" / "index.md").write_text("# Home\n", encoding="utf-8")
        options = {"site_dir": str(tmp_path / "site"), "plugins": [], "extra_css": [], "watch": [], "hooks": []}
        build(load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(tmp_path / "docs"), nav=["index.md"], **options))

    def test_a_link_to_a_file_of_the_repository_leads_to_its_page(self):
        text = "[code](../../src/poa/family.py#L3) [log](../../CHANGELOG.md) [gone](../../gone.py) [near](a.md)"
        assert docs_hooks.led(text, "howto/export.md") == (
            "[code](../repository/src/poa/family.py.md#L3) [log](../changelog.md) [gone](../../gone.py) [near](a.md)"
        )
        assert list(docs_hooks.linked_files("howto/export.md", text)) == ["src/poa/family.py"]
        assert "class Family:" in docs_hooks.listing("src/poa/family.py")

    @pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
    def test_links_of_files_outside_the_site_lead_somewhere(self, name):
        for link, anchor in re.findall(r"\]\(([^)#\s:]+)(?:#([^)\s]+))?\)", (ROOT / name).read_text(encoding="utf-8")):
            assert (ROOT / link).exists(), link
            if anchor:
                headings = re.findall(r"^#+ (.*)$", (ROOT / link).read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in [slugify(heading, "-") for heading in headings], anchor

    def test_links_of_included_files_are_read_from_where_the_files_are(self):
        assert docs_hooks.led("[new](docs/new-backbone.md)", "contributing.md") == "[new](new-backbone.md)"
