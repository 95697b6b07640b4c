import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from semtoken_hf.evaluation.model_card import CardSources, describe_adaptation, rounded, write_card
from tests.fixtures.metrics import make_metrics
from tests.fixtures.tiny import tiny_model


def test_the_card_holds_what_was_measured(tmp_path):
    template = Path(__file__).parents[2] / "model_cards" / "TEMPLATE.md"
    log = tmp_path / "log.jsonl"
    log.write_text(
        json.dumps({"step": 1, "tokens": 1_000_000, "loss": 9.0})
        + "\n"
        + json.dumps({"step": 2, "tokens": 2_000_000, "loss": 3.5, "held_out": {"novels.txt": 3.25}})
        + "\n"
    )
    measured = make_metrics()
    source, folder = tmp_path / "measured.json", tmp_path / "tiny"
    source.write_text(json.dumps(measured))
    tiny_model().save_pretrained(folder)
    write_card(tiny_model(), folder, CardSources(template, log, "train me", source))
    card = (folder / "README.md").read_text()
    assert "$" not in card
    assert "  modeling_semtoken_llama.py\n" in card
    assert "2 steps, 2.0 M tokens" in card
    assert "train me" in card
    assert "Not adapted" in card
    assert "| `novels.txt` | 3.25 |" in card
    for cell in measured["cells"]:
        assert f"{100 * cell['cost']:+,.1f} %" in card
    assert card.count(measured["provenance"]["command"]) == 1

    copied = json.loads((folder / "metrics.json").read_text())
    cells = [{k: v for k, v in c.items() if k != "groups"} for c in measured["cells"]]
    assert copied["cells"] == rounded(cells)
    assert copied["cells"][0]["cost"] == pytest.approx(cells[0]["cost"], rel=1e-5)
    assert copied["config"]["data_dir"] == "data"
    shown = {part.split(")")[0] for part in card.split("](plots/")[1:]}
    assert shown == {file.name for file in (folder / "plots").iterdir()}
    data = ModelCard.load(folder / "README.md").data
    assert data.model_name == "tiny"
    assert "semtoken" in data.tags
    assert {r.dataset_name for r in data.eval_results} == {"WikiText-103", "HotpotQA", "needle in a haystack"}


def test_the_card_of_an_adapted_checkpoint_says_how():
    config = tiny_model().config
    config.adapted_for = {"trainable": "full", "ratios": [1.5, 6.0], "steps": 700, "position_mode": "compact"}
    text = describe_adaptation(config, "adapt me")
    assert "700 steps, training all but the encoder" in text
    assert "ratios 1.5 to 6" in text
    assert 'position_mode="compact"' in text
    assert "```bash\nadapt me\n```" in text
