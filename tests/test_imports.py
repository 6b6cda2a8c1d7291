"""Imports run one way, and every public name is where it says it is.

    bench, serve_integration -> loader -> cachefs <- p2p        all -> the shared modules

Nobody imports bench. The command line and the demo may import everything, the command line only
inside functions: starting it must not load what one command needs.
"""

import ast
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bench", "cachefs", "loader", "p2p", "serve_integration")
FRONT = ("cli", "demo", "serve")  # what stands in front of everything
SHARED = ("errors", "settings", "log", "metrics")
ALLOWED = {
    "cachefs": {"cachefs"},
    "p2p": {"p2p", "cachefs"},
    "loader": {"loader", "cachefs"},
    "serve_integration": {"serve_integration", "loader", "cachefs", "p2p"},
    "bench": {"bench", "serve_integration", "loader", "cachefs", "p2p", "demo"},
}


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module, and whether importing the file imports it."""

    module: str
    line: int
    eager: bool


def sources() -> list[tuple[str, Path]]:
    """Return (part, file) for every module; part is a folder's name or a shared module's."""
    found = [(folder, file) for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    home = ROOT / "src" / "weightstream"
    found += [(file.stem, file) for file in sorted(home.glob("*.py"))]
    found += [(front, file) for front in FRONT for file in sorted((home / front).rglob("*.py"))]
    return found


def name_of(file: Path) -> str:
    """Return the module's name under weightstream."""
    path = file.relative_to(ROOT)
    parts = path.parts[1:] if path.parts[0] == "src" else ("weightstream", *path.parts)
    return ".".join(parts).removesuffix(".py").removesuffix(".__init__")


def imports(file: Path) -> Iterator[Import]:
    """Yield every import in a file, those under TYPE_CHECKING left out."""
    yield from _walk(ast.parse(file.read_text(encoding="utf-8")).body, eager=True)


def _walk(body: list[ast.stmt], *, eager: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield Import(node.module or "", node.lineno, eager)
            for alias in node.names:
                if node.module == "weightstream":
                    yield Import(f"weightstream.{alias.name}", node.lineno, eager)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for field in ("body", "orelse", "finalbody"):
            yield from _walk(getattr(node, field, []), eager=eager and not inside)
        for handler in getattr(node, "handlers", []):
            yield from _walk(handler.body, eager=eager)


def part_of(module: str) -> str | None:
    """Return the part of weightstream that a module belongs to; None for other packages."""
    parts = module.split(".")
    if parts[0] != "weightstream" or len(parts) < 2:
        return None
    return parts[1]


@pytest.mark.parametrize(("part", "file"), sources(), ids=lambda value: str(value)[-60:])
def test_imports_run_one_way(part: str, file: Path) -> None:
    if part in FRONT:
        return
    allowed = ALLOWED.get(part, set()) | set(SHARED)
    if part in (*SHARED, "__init__"):
        allowed = set(SHARED) | ({"loader"} if part == "__init__" else set())
    for found in imports(file):
        target = part_of(found.module)
        if target is not None and not target.startswith("__"):
            assert target in allowed, f"{file}:{found.line} imports {found.module}"


@pytest.mark.parametrize("file", [file for part, file in sources() if part == "cli"])
def test_cli_imports_bench_and_torch_only_inside_functions(file: Path) -> None:
    for found in imports(file):
        heavy = found.module.split(".")[0] in {"torch", "transformers", "matplotlib", "s3fs"}
        if part_of(found.module) == "bench" or heavy:
            assert not found.eager, f"{file}:{found.line} imports {found.module} at its top level"


def test_shared_modules_are_the_ones_named_here() -> None:
    home = ROOT / "src" / "weightstream"
    assert {file.stem for file in home.glob("*.py")} <= {*SHARED, *FRONT, "__init__"}


def packages() -> list[str]:
    """Return every package that declares `__all__`."""
    declared = [file for _, file in sources() if "__all__" in file.read_text(encoding="utf-8")]
    return [name_of(file) for file in declared]


@pytest.mark.parametrize("name", packages())
def test_all_names_what_the_module_has(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    for public in module.__all__:
        assert getattr(module, public) is not None


@pytest.mark.parametrize("name", packages())
def test_packages_export_what_they_import_and_do_not_use(name: str) -> None:
    """A name imported from an own module and not used here is there for others: in `__all__`."""
    module = importlib.import_module(name)
    tree = ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(name)
        for alias in node.names
    }
    assert imported - used <= set(module.__all__)
