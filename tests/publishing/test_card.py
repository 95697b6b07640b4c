"""The card names the repository, and a checkpoint without one gets what can be said of any."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from semtoken_hf.publishing.card import render_card
from semtoken_hf.publishing.module_hashes import BEGIN, END, module_hashes
from semtoken_hf.publishing.selection import select_files


def render(folder, card=None, repo_id="me/online"):
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return render_card(folder, select_files(folder), repo_id)


def without_modules(text):
    """What stands before the list of modules, at the end of a card that had none."""
    before, _, rest = text.partition(f"\n{BEGIN}")
    assert rest.endswith(f"{END}\n")
    return before


def test_the_folder_is_named_as_the_repository(make_checkpoint):
    own = "tok.from_pretrained(\"cards/tiny-semtoken\", x=1); m.from_pretrained('tiny-semtoken/')\n"
    other = 'm.from_pretrained("cards/tiny-semtoken-2")\nm.from_pretrained("meta/llama") "tiny-semtoken"\n'
    text = without_modules(render(make_checkpoint(), own + other))
    assert text == "tok.from_pretrained(\"me/online\", x=1); m.from_pretrained('me/online')\n" + other


def test_other_text_stays_as_it_is(make_checkpoint):
    text = "---\nlicense: mit\n---\n# 模型 {braces} \\1\n"
    assert without_modules(render(make_checkpoint(), text)) == text


@pytest.mark.parametrize(("kind", "needs"), [("single", "`torch`."), ("adapted", "`torch`, and `peft`.")])
def test_a_folder_without_a_card(make_checkpoint, kind, needs):
    text = render(make_checkpoint(kind))
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert "semtoken" in data.tags
    assert "# online\n" in text
    assert "`semtoken_llama`" in text
    assert "2.4 times fewer" in text
    assert text.count('from_pretrained("me/online", trust_remote_code=True)') == 2
    assert needs in text


def test_broken_metadata_is_refused(make_checkpoint):
    with pytest.raises(ValueError, match=r"metadata of README\.md is not valid"):
        render(make_checkpoint(), "---\nlicense: [mit\n---\n")


@pytest.mark.parametrize("own", [None, f"# Mine\n\n{BEGIN}\nof an old push\n{END}\n\n## More\n"])
def test_the_code_that_goes_along_is_listed(make_checkpoint, own):
    folder = make_checkpoint()
    (folder / "left_behind.py").write_text("never = 'sent'")
    text = render(folder, own)
    hashes = module_hashes(select_files(folder).files.values())
    assert len(hashes) > 20
    listed = [line for line in text.splitlines() if line.endswith(".py")]
    assert listed == [f"{digest}  {name}" for name, digest in hashes.items()]
    assert "left_behind" not in text
    assert "old push" not in text
    if own is not None:
        assert text.startswith(f"# Mine\n\n{BEGIN}")
        assert text.endswith(f"{END}\n\n## More\n")
