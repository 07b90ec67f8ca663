"""Model cards: what they say, that their code runs, and that the card of an author is never replaced."""

import re

import pytest
import torch
from helpers import byte_tokenizer, save_pair
from huggingface_hub import ModelCard
from support import checkpoints
from support.training import config_for, write_files

from dovetail_plugin import DovetailDraft
from dovetail_plugin.cli import main
from dovetail_plugin.drafts.card import CARD, license_in, model_card
from dovetail_plugin.training import train

pytestmark = [
    pytest.mark.torch_only("about checkpoints, which are the same for every engine"),
    pytest.mark.usefixtures("fixed_budget"),
]


def card_of(directory):
    """The card as a hub reads it."""
    return ModelCard.load(directory / CARD)


def test_fields_and_text(draft, tmp_path):
    draft.config.target_name_or_path = "org/model-8B"
    draft.save_pretrained(tmp_path / "draft")
    card = card_of(tmp_path / "draft")
    assert card.data.to_dict() == {
        "library_name": "dovetail-plugin",
        "tags": ["speculative-decoding", "dovetail"],
        "base_model": "org/model-8B",
    }
    assert "# Draft for `org/model-8B`\n" in card.text and "decoder blocks and Dynamic Gating Fusion." in card.text
    assert not re.search(r"[ \t]$", card.content, re.MULTILINE)


@pytest.mark.parametrize(
    "name", [None, "", "my-target", "a/b/c", 'x"\n---\nlicense: mit', "{made}", "../../etc", "a b"]
)
def test_names_that_no_hub_has(name, draft, tmp_path):
    """They are no base model, and add nothing to the card."""
    draft.config.target_name_or_path = name
    draft.save_pretrained(tmp_path / "draft")
    card = card_of(tmp_path / "draft")
    assert card.data.to_dict().keys() == {"library_name", "tags"}
    named = "`my-target`" if name == "my-target" else "its target"
    assert f"# Draft for {named}\n" in card.text and "etc" not in card.content


def test_the_code_runs(tmp_path, capsys):
    """With the directories of a pair in place of the names."""
    target, saved = save_pair(tmp_path)
    draft = DovetailDraft.from_pretrained(saved)
    draft.config.target_name_or_path = "org/model"
    draft.save_pretrained(tmp_path / "copy")
    (code,) = re.findall(r"```python\n(.*?)```", card_of(tmp_path / "copy").text, re.DOTALL)
    assert code.count('"org/model"') == 2 and code.count("path-or-hub-id-of-this-draft") == 1
    code = code.replace("org/model", str(target)).replace("path-or-hub-id-of-this-draft", str(saved))
    names: dict = {}
    exec(code.replace("max_new_tokens=256", "max_new_tokens=8"), names)
    plain = names["target"].generate(**names["inputs"], max_new_tokens=8)
    assert torch.equal(names["output"], plain) and names["draft"].report.rounds
    assert byte_tokenizer().decode(plain[0], skip_special_tokens=True) in capsys.readouterr().out


# --- the card of an author ---------------------------------------------------------------------------


def test_a_card_that_exists_stays(draft, tmp_path):
    """In a new repository, and beside an older draft."""
    (tmp_path / CARD).write_text("mine")
    for _ in range(2):
        draft.save_pretrained(tmp_path)
        assert (tmp_path / CARD).read_text() == "mine"
    assert (tmp_path / "model.safetensors").exists()
    assert sorted(tmp_path.glob(".*")) == []
    (tmp_path / CARD).unlink()
    (tmp_path / CARD).symlink_to("nowhere")
    draft.save_pretrained(tmp_path)
    assert (tmp_path / CARD).is_symlink()


def test_a_process_that_saves_no_weights_writes_no_card(draft, tmp_path):
    draft.save_pretrained(tmp_path / "draft", is_main_process=False)
    wrote = (tmp_path / "draft" / "model.safetensors").exists()  # as transformers did before 5.24
    assert (tmp_path / "draft" / CARD).exists() == wrote


def test_training(tmp_path):
    """The card says how the draft was made, without names of the data; one that exists stays."""
    files = write_files(tmp_path)
    train(config_for(files, tmp_path / "draft", steps=3))
    text = card_of(tmp_path / "draft").text
    assert re.search(r"`dovetail train` in 3 steps, and its held-out acceptance length is \d\.\d\d tokens in", text)
    assert "greedy chains of 2. `training.json` has" in text and "chats" not in text and "# Draft for `target`" in text
    (tmp_path / "draft" / CARD).write_text("mine")
    train(config_for(files, tmp_path / "draft", steps=4), overwrite_output_dir=True)
    assert (tmp_path / "draft" / CARD).read_text() == "mine"


# --- conversion --------------------------------------------------------------------------------------


@pytest.fixture
def eagle3(tmp_path):
    (tmp_path / "eagle3").mkdir()
    return checkpoints.eagle3().write(tmp_path / "eagle3")


@pytest.mark.parametrize("to", ["dovetail", "eagle3", "speculators"])
def test_a_license_goes_along(eagle3, tmp_path, to):
    (eagle3 / CARD).write_text("---\nlanguage: en\nlicense: apache-2.0\nbase_model: other/model\n---\nlicense: mit\n")
    assert main(["convert", str(eagle3), str(tmp_path / "new"), "--to", to]) == 0
    card = card_of(tmp_path / "new")
    assert card.data.license == "apache-2.0" and card.data.base_model is None
    assert "EAGLE-3. It was converted from `eagle3` with `dovetail convert`." in card.text


@pytest.mark.parametrize("how", ["no card", "a link that leads out", "a folder"])
def test_no_license(eagle3, tmp_path, how):
    (tmp_path / "elsewhere").write_text("---\nlicense: mit\n---\n")
    if how == "a folder":
        (eagle3 / CARD).mkdir()
    elif how != "no card":
        (eagle3 / CARD).symlink_to(tmp_path / "elsewhere")
    assert main(["convert", str(eagle3), str(tmp_path / "new"), "--to", "dovetail"]) == 0
    assert card_of(tmp_path / "new").data.license is None


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\r\nlicense: 'llama3.1'\r\n---\r\n", "llama3.1"),
        ('---\nlicense: "mit"  \n---', "mit"),
        ("---\nlicense: other\nlicense_name: own\n---", None),
        ("---\nlicense: [mit, gpl]\n---", None),
        ("---\nlicense:\n- mit\n---", None),
        ("---\nlicense: mit\\n---\nevil", None),
        ("license: mit", None),
        ("# A draft\n---\nlicense: mit\n---", None),
        ("", None),
    ],
)
def test_licenses_in_cards(card, expected, draft):
    assert license_in(card) == expected
    written = ModelCard(model_card(draft.config, license=expected))
    assert written.data.license == expected
