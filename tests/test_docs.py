"""The documentation says what the code does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from weightstream import errors
from weightstream.cli import failures
from weightstream.cli.docs import configuration
from weightstream.settings import table

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_configuration_is_up_to_date() -> None:
    page = (ROOT / "docs" / "CONFIGURATION.md").read_text(encoding="utf-8")
    assert page == configuration(), "run `make docs`"


def test_every_setting_is_documented() -> None:
    page = (ROOT / "docs" / "CONFIGURATION.md").read_text(encoding="utf-8")
    for row in table():
        assert f"`{row.variable}`" in page


def test_documented_settings_exist() -> None:
    known = {row.variable for row in table()} | {"WEIGHTSTREAM_CONFIG"}
    for page in PAGES:
        used = set(re.findall(r"\bWEIGHTSTREAM_[A-Z_]*[A-Z]\b", page.read_text(encoding="utf-8")))
        assert used <= known, page


def test_every_exit_code_is_documented() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    codes = {c.exit_code for c in classes if issubclass(c, errors.WeightstreamError)}
    codes |= {failures.USAGE, failures.BUG, failures.CANCELLED, failures.BROKEN_PIPE}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    assert codes <= rows
    assert codes <= {int(code) for code in re.findall(r"^ {4}(\d+)", failures.__doc__ or "", re.M)}


def test_error_tree_in_the_docstring_is_the_real_one() -> None:
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.WeightstreamError):
            assert re.search(rf"\b{name}\b", errors.__doc__ or ""), name


def links() -> list[tuple[Path, str]]:
    """Return every relative link of every page."""
    found = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if "://" not in target:
                found.append((page, target))
    return found


@pytest.mark.parametrize(("page", "target"), links())
def test_links_lead_somewhere(page: Path, target: str) -> None:
    assert (page.parent / target).exists()


def commands() -> list[str]:
    """Return every `weightstream COMMAND` that the pages show in a code block."""
    found = set()
    for page in PAGES:
        for block in re.findall(
            r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
        ):
            found |= set(re.findall(r"^\$ weightstream ([a-z]+)", block, re.MULTILINE))
    return sorted(found)


def test_documented_commands_exist() -> None:
    run = [sys.executable, "-m", "weightstream.cli", "--help"]
    shown = subprocess.run(run, check=True, capture_output=True, text=True, timeout=30).stdout
    for command in commands():
        assert re.search(rf"^\W*{command}\b", shown, re.MULTILINE), command


def test_documented_make_verbs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for verb in re.findall(r"`make ([a-z]+)", page.read_text(encoding="utf-8")):
            assert re.search(rf"^{verb}:", makefile, re.MULTILINE), verb
