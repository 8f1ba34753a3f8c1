"""README and docs name what is there: files, anchors, recipes, rooms, keys and metrics."""

import ast
import fnmatch
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from opsd_train.config.load import recipe_names
from opsd_train.reporting.collapse import MONITORED
from opsd_train.reporting.step_stats import MEANS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def text_of(page: str | Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """Without code, which may hold brackets that are no links."""
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Of headings, as GitHub and mkdocs make them."""
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    kept = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in HEADING.findall(plain))
    return {re.sub(r"\s+", "-", heading) for heading in kept}


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in LINK.findall(prose(text_of(page))):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if page != "README.md":  # the site holds docs/ alone
            assert target.resolve().is_relative_to(DOCS), f"{page}: {link} is not in the site"
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_is_in_the_sites_contents() -> None:
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f": {page.removeprefix('docs/')}\n" in contents, page


@pytest.mark.parametrize("page", PAGES)
def test_named_recipes_are_there(page: str) -> None:
    known = [*recipe_names("train"), *recipe_names("eval")]
    for name in re.findall(r"(?<![\w/-])(?:demo|paper)/[\w.*-]*[\w*]", text_of(page)):
        assert fnmatch.filter(known, name), f"{page}: {name}"


def tree() -> set[str]:
    """Paths that the trees of the architecture page name, folders with a slash."""
    found, folders = set(), []
    for block in re.findall(
        r"^```text\n(.*?)^```$", text_of(DOCS / "architecture.md"), re.S | re.M
    ):
        for line in block.splitlines():
            name = line.split()[0]
            depth = (len(line) - len(line.lstrip())) // 2
            folders[depth:] = [name] if name.endswith("/") else []
            found.add("".join(folders) + ("" if name.endswith("/") else name))
    return found


def test_the_tree_is_that_of_the_packages() -> None:
    named = tree()
    assert [path for path in named if not (ROOT / path).exists()] == []
    files = [
        path for room in ("opsd_kernels", "opsd_train") for path in (ROOT / room).rglob("*.py")
    ]
    rooms = {f"{path.parent.relative_to(ROOT).as_posix()}/" for path in files}
    assert rooms == {path for path in named if path.endswith("/")}


def test_the_keys_are_those_of_the_recipes() -> None:
    assert script("write_keys").page() == text_of(DOCS / "keys.md"), "run python docs/write_keys.py"


@pytest.mark.slow
def test_the_scale_page_is_what_the_predictions_say(tmp_path: Path) -> None:
    written = script("write_scale").page(tmp_path)
    assert written == text_of(DOCS / "scale.md"), "run python docs/write_scale.py"


def test_a_row_of_the_scale_page(tmp_path: Path) -> None:
    """The test above, of one prediction."""
    scale = script("write_scale")
    row = scale.row(tmp_path, "8B", "a100", 512)
    assert f"\n{row}\n" in text_of(DOCS / "scale.md"), "run python docs/write_scale.py"


def script(name: str) -> ModuleType:
    """A script that writes a page."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_metric_is_explained() -> None:
    """Those of a step's statistics, and those whose names these files write into a row."""
    page, names = text_of(DOCS / "metrics.md"), set()
    for file in ("trainer.py", "reporting/step_row.py", "data/contexts.py"):
        source = ast.parse(text_of(f"opsd_train/{file}"))
        keys = [key for node in ast.walk(source) if isinstance(node, ast.Dict) for key in node.keys]
        names |= {key.value for key in keys if isinstance(key, ast.Constant)} - state_keys(source)
    assert len(names) > 10
    for name in sorted({*names, *MEANS.values(), *MONITORED}):
        assert f"`{name}`" in page, name


def state_keys(source: ast.Module) -> set[str]:
    """What a checkpoint keeps: no metrics."""
    functions = [n for n in ast.walk(source) if isinstance(n, ast.FunctionDef)]
    others = [n for n in functions if n.name in ("state_dict", "rank_state")]
    nodes = [node for function in others for node in ast.walk(function)]
    keys = [key for node in nodes if isinstance(node, ast.Dict) for key in node.keys]
    return {key.value for key in keys if isinstance(key, ast.Constant)}
