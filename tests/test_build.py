"""What is published holds the whole program."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bench", "cachefs", "loader", "p2p", "serve_integration")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the source archive, as a packager does; without the network."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def expected() -> set[str]:
    """Return every module of the tree, as a path in the wheel."""
    home = ROOT / "src" / "weightstream"
    own = {file for part in home.iterdir() if not part.is_symlink() for file in modules(part)}
    rest = {file for folder in FOLDERS for file in modules(ROOT / folder)}
    found = {file.relative_to(ROOT / "src") for file in own}
    found |= {Path("weightstream") / file.relative_to(ROOT) for file in rest}
    return {str(path) for path in found}


def modules(part: Path) -> list[Path]:
    """Return the Python files in a folder, or the file itself."""
    if part.is_dir():
        return list(part.rglob("*.py"))
    return [part] if part.suffix == ".py" else []


def test_wheel_holds_every_module_once(dist: Path) -> None:
    [wheel] = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {name for name in names if name.endswith(".py")} == expected()
    assert "weightstream/py.typed" in names


def test_wheel_imports_without_the_tree(dist: Path, tmp_path: Path) -> None:
    [wheel] = dist.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import weightstream.cli, weightstream.cachefs.blob, weightstream.loader
print(weightstream.cachefs.blob.__file__)
"""
    run = [sys.executable, "-I", "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))


def test_source_archive_holds_the_tests_and_no_link(dist: Path) -> None:
    [archive] = dist.glob("*.tar.gz")
    with tarfile.open(archive) as members:
        names = [member.name for member in members]
        assert not [member.name for member in members if member.issym()]
    assert any(name.endswith("tests/test_build.py") for name in names)
    assert any(name.endswith("/README.md") for name in names)
