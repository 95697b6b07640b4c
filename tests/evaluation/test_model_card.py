import json
from pathlib import Path

from semtoken_hf.evaluation.model_card import CardSources, describe_adaptation, write_card
from tests.fixtures.text import PROSE
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

COLUMNS = {"target_ratio", "method", "tokens_per_slot", "perplexity", "cost", "context_gain_kept"}


def test_the_card_holds_what_was_measured(tmp_path):
    template = Path(__file__).parents[2] / "model_cards" / "TEMPLATE.md"
    log = tmp_path / "log.jsonl"
    log.write_text(
        json.dumps({"step": 1, "tokens": 1_000_000, "loss": 9.0})
        + "\n"
        + json.dumps({"step": 2, "tokens": 2_000_000, "loss": 3.5, "held_out": {"novels.txt": 3.25}})
        + "\n"
    )
    text = tmp_path / "text.txt"
    text.write_text(PROSE)
    model = tiny_model()
    mode = model.config.segmentation_mode
    sources = CardSources(template, log, "train me", text, 60, 12, windows=2, ratios=[2.0, 3.0])
    metrics = write_card(model, tiny_tokenizer(), tmp_path / "tiny", sources)
    assert model.config.segmentation_mode == mode
    assert json.loads((tmp_path / "tiny" / "metrics.json").read_text()) == metrics
    assert all(set(record) == COLUMNS for record in metrics["costs"])
    assert len(metrics["costs"]) == 2 * 7
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert "$" not in card
    assert "2 steps, 2.0 M tokens" in card
    assert "train me" in card
    assert "Not adapted" in card
    assert "| `novels.txt` | 3.25 |" in card
    for record in metrics["costs"]:
        assert f"| {record['method']} | {record['tokens_per_slot']:.2f} | {record['perplexity']:.2f} |" in card


def test_the_card_of_an_adapted_checkpoint_says_how(tmp_path):
    config = tiny_model().config
    config.adapted_for = {"trainable": "full", "ratios": [1.5, 6.0], "steps": 700, "position_mode": "compact"}
    text = describe_adaptation(config, "adapt me")
    assert "700 steps, training all but the encoder" in text
    assert "ratios 1.5 to 6" in text
    assert 'position_mode="compact"' in text
    assert "```bash\nadapt me\n```" in text
