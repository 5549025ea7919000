"""What the documents say is what the code does."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.settings import read_by

README = (ROOT / "README.md").read_text()
MODULES = sorted((*ROOT.glob("*.py"), *ROOT.glob("darwin_runtime/**/*.py")))

DOCUMENTS = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))
PAGES = sorted(ROOT.glob("docs/architecture/*.md"))

SECTIONS = {"main": "Main container", "init": "Init container", "cleanup": "Cache CronJob", "every": "Every role"}


def section(title: str) -> str:
    [found] = re.findall(rf"^### {title}\n(.*?)(?=^##)", README, re.MULTILINE | re.DOTALL)
    return str(found)


def table(title: str) -> dict[str, tuple[str, str]]:
    """Name -> (meaning, default) of a settings table."""
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| ?(.*?) \|$", section(title), re.MULTILINE)
    return {name: (meaning, default) for name, meaning, default in rows}


@pytest.mark.parametrize("role", SECTIONS)
def test_every_setting_is_in_its_table(role: str) -> None:
    assert set(table(SECTIONS[role])) == set(read_by(role))


@pytest.mark.parametrize("role", SECTIONS)
def test_defaults_are_as_documented(role: str) -> None:
    documented = table(SECTIONS[role])
    for name, default in read_by(role).items():
        said = documented[name][1]
        if default is not None and said.startswith("`"):
            assert said == f"`{default}`", name
    assert [name for name, (_, said) in documented.items() if said.startswith("`")], "some defaults were compared"


@pytest.mark.parametrize("role", ["main", "init", "cleanup"])
def test_a_role_s_docstring_names_its_settings(role: str) -> None:
    file = {"main": "darwin_serve.py", "init": "download.py", "cleanup": "cleanup.py"}[role]
    docstring = ast.get_docstring(ast.parse((ROOT / file).read_text())) or ""
    own = {name for name in read_by(role) if not name.startswith("MLFLOW_HTTP")}
    assert [name for name in sorted(own | set(read_by("every"))) if not re.search(rf"\b{name}\b", docstring)] == []


def _strings() -> str:
    """Every string in the code, those of f-strings piece by piece."""
    found = [
        node.value
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return re.sub(r"%[-\d.]*[a-z]", "", "\n".join(found))


def _log_lines() -> list[str]:
    [troubles] = re.findall(r"^## When something goes wrong\n(.*?)(?=^## )", README, re.MULTILINE | re.DOTALL)
    return [line for block in re.findall(r"```text\n(.*?)```", troubles, re.DOTALL) for line in block.splitlines()]


def _mistakes() -> list[list[str]]:
    """The cells of each mistake: its number, the mistake, `get`, `describe`, `logs`, the remedy."""
    rows = re.findall(r"^\| (\d+ \| .+) \|$", (ROOT / "docs" / "mistakes.md").read_text(), re.MULTILINE)
    return [row.split(" | ") for row in rows]


def test_each_mistake_has_its_signs_and_its_remedy() -> None:
    mistakes = _mistakes()
    assert [cells[0] for cells in mistakes] == [str(number + 1) for number in range(25)]
    for number, *cells in mistakes:
        assert len(cells) == 5, number
        assert all(cells), number
        referred = [int(other) for cell in cells for other in re.findall(r"as in (\d+)", cell)]
        assert all(other < int(number) for other in referred)


_MISTAKES_LINES = sorted({line for cells in _mistakes() for line in re.findall(r"`([^`]+)`", cells[4])})


@pytest.mark.parametrize("line", [*_log_lines(), *_MISTAKES_LINES])
def test_a_log_line_in_the_documents_is_one_of_the_code(line: str) -> None:
    code = _strings()
    # What the code puts together from parts: a status, a constant, which credentials.
    parts = re.split("…|401|403|404|MLmodel|CACHEDIR.TAG|(?=MLFLOW_TRACKING_USERNAME)", line)
    pieces = [piece for part in parts if len(piece := part.strip(" ,;:()")) > 3]
    assert pieces
    for piece in pieces:
        assert piece in code, piece


def test_figures_are_those_of_the_benchmark() -> None:
    results = (ROOT / "bench" / "RESULTS.md").read_text()
    [speed] = re.findall(r"^## Speed\n(.*?)^How it is fast", README, re.MULTILINE | re.DOTALL)
    told = re.findall(r"(?<=\| )[\d,.]+(?= \|)|[\d.,]+ (?:m?s|MiB)\b", speed)
    assert len(told) > 40
    assert [figure for figure in told if not re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d.,]*\d)", results)] == []


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> list[str]:
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text()):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if link.startswith("/") or not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path) == []


@pytest.mark.parametrize(
    "link",
    ["there.md", "here.md#a-heading", "#a-heading", "#a-b", "gone.md", "here.md#gone", "#gone", "#code", "/here.md"],
)
def test_a_broken_link_is_found(link: str, tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("")
    page = tmp_path / "here.md"
    page.write_text(f"# A heading\n\n## `a`, b\n\n```sh\n# code\n```\n\n[a link]({link})\n")
    assert bool(broken_links(page)) == (link in ("gone.md", "here.md#gone", "#gone", "#code", "/here.md"))


def listed_modules() -> list[str]:
    """The modules that the page of each room lists; a name with a slash at its end lists a folder."""
    listed = []
    for page in PAGES:
        room = "" if page.stem == "roles" else f"darwin_runtime/{page.stem}/"
        listed += [room + name for name in re.findall(r"^- `([\w/]+(?:\.py|/))`: ", page.read_text(), re.MULTILINE)]
    return listed


def test_every_module_has_its_place_in_the_house() -> None:
    listed = listed_modules()
    modules = [str(path.relative_to(ROOT)) for path in MODULES if path.name != "__init__.py"]
    folders = tuple(name for name in listed if name.endswith("/"))
    assert [name for name in listed if not (ROOT / name).exists()] == []
    assert sorted(name for name in listed if not name.endswith("/")) == sorted(
        module for module in modules if not module.startswith(folders)
    )


def test_the_architecture_names_modules_that_a_page_lists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    named = {name.removeprefix("darwin_runtime/") for name in re.findall(r"`([\w/]+/\w+\.py)`", text)}
    assert len(named) > 15
    assert named - {name.removeprefix("darwin_runtime/") for name in listed_modules()} == {"tests/test_house.py"}


def test_every_room_has_a_page_that_the_architecture_links() -> None:
    rooms = {path.parent.name for path in ROOT.glob("darwin_runtime/*/__init__.py")}
    assert {page.stem for page in PAGES} == rooms | {"roles"}
    linked = re.findall(r"\]\(docs/architecture/(\w+)\.md", (ROOT / "ARCHITECTURE.md").read_text())
    assert set(linked) == {page.stem for page in PAGES}


def test_every_module_says_what_it_is_for() -> None:
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), path.name


def test_each_runtime_dependency_is_argued_for() -> None:
    block = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert block
    names = re.findall(r'"([\w-]+)', block[1])
    assert len(names) > 5
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    assert [name for name in names if f"`{name}`" not in contributing] == []


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCUMENTS:
        asked = set(re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(), re.MULTILINE))
        assert asked <= targets, f"{path.name}: {asked - targets}"


def test_make_says_what_can_be_made() -> None:
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^make ([\w-]+)", said, re.MULTILINE) == [
        "help",
        "setup",
        "clients",
        "run",
        "test",
        "test-fast",
        "test-all",
        "wheelhouse",
        "base-image",
        "test-image",
        "image-report",
        "rollouts",
        "soak",
        "soak-serve",
        "soak-cache",
        "soak-kills",
        "fuzz",
        "lint",
        "bench",
        "lock",
        "clean",
    ]


@pytest.mark.parametrize("path", [ROOT / "SECURITY.md", *PAGES], ids=lambda path: path.name)
def test_tests_that_a_document_names_exist(path: Path) -> None:
    named = re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?`", path.read_text())
    assert len(named) > (50 if path.name == "SECURITY.md" else 2)
    for file, name in named:
        [found] = (ROOT / "tests").rglob(file)
        text = found.read_text()
        assert not name or f"\ndef {name}(" in text, f"{file}::{name}"
