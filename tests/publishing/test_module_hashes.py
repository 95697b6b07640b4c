"""The code of a checkpoint by its hashes: listed in its card, compared with the package, checked by `sha256sum`."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from semtoken_hf.publishing.module_hashes import (
    BEGIN,
    END,
    PACKAGE,
    checksum_lines,
    compare_modules,
    module_hashes,
    package_version,
    shipped_modules,
    with_modules,
)
from tests.fixtures.children import ROOT
from tests.fixtures.scripts import load_script

EMBEDDED = ROOT / "model_cards" / "semtoken-llama-tiny"
RELEASE = ROOT / "model_cards" / "MODULES.sha256"
REFRESH = "run `python scripts/refresh_modules.py`"


def listed_in(card):
    """name -> hash of the lines between the markers."""
    section = card.split(BEGIN)[1].split(END)[0]
    lines = section.split("```text\n")[1].split("```")[0].splitlines()
    return dict(reversed(line.split("  ")) for line in lines)


def test_a_saved_folder_carries_the_modules_of_this_package(make_checkpoint):
    found = compare_modules(make_checkpoint())
    assert found.is_same
    assert {"modeling_semtoken_llama.py", "tokenization_semtoken_fast.py", "compression.py"} <= set(found.same)
    assert found.describe() == ""


def test_every_difference_is_named(make_checkpoint):
    folder = make_checkpoint()
    module = folder / "compression.py"
    module.write_bytes(module.read_bytes() + b"\n")
    (folder / "token_layout.py").unlink()
    (folder / "evil.py").write_text("from .worse import x")
    found = compare_modules(folder)
    assert not found.is_same
    assert (found.changed, found.missing, found.foreign) == (
        ("compression.py",),
        ("token_layout.py", "worse.py"),
        ("evil.py",),
    )
    assert found.describe() == "changed: compression.py; missing: token_layout.py, worse.py; foreign: evil.py"


def test_what_ships_is_every_flat_module_but_the_package_itself():
    names = {file.name for file in shipped_modules()}
    assert {file.name for file in PACKAGE.glob("*.py")} - names == {
        "__init__.py",
        "__main__.py",
        "families.py",
        "private_names.py",
    }
    assert not {"__init__.py", "command_line.py"} & names


def test_a_card_says_whether_the_code_is_the_releases(make_checkpoint):
    folder = make_checkpoint()
    card = with_modules("# Mine", module_hashes(folder.glob("*.py")))
    assert f"They are those of semtoken-hf {package_version()}." in card
    assert listed_in(card) == module_hashes(folder.glob("*.py"))
    (folder / "compression.py").write_text("")
    (folder / "evil.py").write_text("")
    card = with_modules(card, module_hashes(folder.glob("*.py")))
    assert card.count(BEGIN) == 1
    assert f"**Not those of semtoken-hf {package_version()}**" in card
    assert ": compression.py, evil.py." in card


@pytest.mark.parametrize("card", [BEGIN, f"{END}{BEGIN}"])
def test_half_a_section_is_refused(card):
    with pytest.raises(ValueError, match="once each"):
        with_modules(card, {})


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_reads_the_list(make_checkpoint):
    folder = make_checkpoint()
    (folder / "MODULES.sha256").write_text(checksum_lines(module_hashes(folder.glob("*.py"))))
    command = ["sha256sum", "--check", "--strict", "--quiet", "MODULES.sha256"]
    assert subprocess.run(command, cwd=folder, check=False).returncode == 0
    (folder / "compression.py").write_text("")
    assert subprocess.run(command, cwd=folder, check=False, stderr=subprocess.DEVNULL).returncode == 1


def test_the_list_of_the_release_is_this_code():
    assert RELEASE.read_text() == checksum_lines(module_hashes(shipped_modules())), REFRESH


def test_the_embedded_card_lists_the_modules_beside_it():
    assert listed_in((EMBEDDED / "README.md").read_text()) == module_hashes(EMBEDDED.glob("*.py")), REFRESH


def test_a_folder_gets_the_modules_and_the_card_their_hashes(make_checkpoint, monkeypatch, capsys, tmp_path):
    folder = make_checkpoint()
    module = load_script("refresh_modules.py")
    monkeypatch.setattr(module, "CARDS", folder.parent)
    (folder / "README.md").write_text(f"# Mine\n{BEGIN}\nold\n{END}\nthe end\n")
    (folder / "compression.py").write_text("old")
    (folder / "moved_elsewhere.py").write_text("old")
    module.main()
    assert str(folder) in capsys.readouterr().out
    assert compare_modules(folder).is_same
    card = (folder / "README.md").read_text()
    assert listed_in(card) == module_hashes(folder.glob("*.py"))
    assert card.startswith("# Mine\n")
    assert card.endswith("the end\n")
    assert (folder.parent / "MODULES.sha256").read_text() == checksum_lines(module_hashes(shipped_modules()))
