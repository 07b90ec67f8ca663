"""Checkpoints of other projects: random ones in each format, against a slow version of their published equations.

The reference reads the published tensors under their published names, token by token, with no cache and no code of
the package.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from families import VOCAB, prompt, tiny_target
from reference import rms, rotate
from safetensors.torch import save_file
from support.checkpoints import (
    DIM,
    EPS,
    FORMATS,
    HEADS,
    KV_HEADS,
    TARGET_LAYERS,
    H,
    Published,
    eagle,
    eagle3,
    paper,
    text,
    weight,
)
from torch import Tensor

from dovetail_plugin import DovetailDraft, TreeBudget
from dovetail_plugin.drafts.checkpoints.read import UnknownFormat, kind_of, load_checkpoint
from dovetail_plugin.drafts.feature_drafter import FeatureDrafter
from dovetail_plugin.drafts.torch_runner import TorchRunner
from dovetail_plugin.report import PhaseClock

pytestmark = pytest.mark.usefixtures("fixed_budget")

# --- the published equations -----------------------------------------------------------------------


class Reference:
    """One published draft, computed token by token, with the embedding and the head of the target."""

    def __init__(self, made: Published, embedding: Tensor, head: Tensor) -> None:
        self.made, self.t = made, {name.removeprefix("model."): tensor for name, tensor in made.tensors.items()}
        self.kind = "eagle3" if made.kind == "speculators" else made.kind
        config = made.config.get("transformer_layer_config", made.config)
        self.theta = config["rope_theta"]
        self.norm_first = made.config.get("norm_before_residual", False)
        flags = (made.config, made.config.get("eagle_config", {}))
        self.norm_output = any(part.get("norm_output", False) for part in flags)
        own = self.kind == "eagle3" and "embed_tokens.weight" in self.t
        self.embedding, self.target_head = self.t["embed_tokens.weight"] if own else embedding, head
        self.prefix = "layers.0." if made.kind == "speculators" else "midlayer."

    def attend(self, name: str, rows: list[Tensor]) -> Tensor:
        """Attention of the last row over all rows, positions from 0."""
        at = lambda part: self.t[f"{name}self_attn.{part}_proj.weight"]  # noqa: E731
        query = (at("q") @ rows[-1]).view(HEADS, DIM)
        keys, values = ([(at(part) @ row).view(KV_HEADS, DIM) for row in rows] for part in "kv")
        mixed = []
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            turned = rotate(query[head], len(rows) - 1, self.theta)
            scores = [turned @ rotate(key[group], j, self.theta) / math.sqrt(DIM) for j, key in enumerate(keys)]
            weights = torch.softmax(torch.stack(scores), 0)
            mixed.append(sum(w * value[group] for w, value in zip(weights, values, strict=True)))
        return at("o") @ torch.cat(mixed)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        normed = rms(x, self.t[f"{name}post_attention_layernorm.weight"], EPS)
        gate, up, down = (self.t[f"{name}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return x + down @ (F.silu(gate @ normed) * (up @ normed))

    def fuse(self, feature: Tensor, token: int) -> Tensor:
        e = self.embedding[token]
        if self.kind == "eagle":
            return self.t["fc.weight"] @ torch.cat([e, feature]) + self.t.get("fc.bias", torch.zeros(H))
        h1 = feature @ self.t["W_1"]
        h2 = F.silu(rms(e, self.t["input_layernorm.weight"], EPS) @ self.t["W_2"])
        z = torch.sigmoid(torch.cat([h1, h2]) @ self.t["W_z"])
        return z * h1 + (1 - z) * h2

    def predict(self, features: list[Tensor], tokens: list[int]) -> Tensor:
        """Prediction after the last of n pairs (feature, next token); features have width H."""
        if self.kind == "eagle3":
            name, rows = self.prefix, []
            for feature, token in zip(features, tokens, strict=True):
                e = rms(self.embedding[token], self.t[f"{name}input_layernorm.weight"], EPS)
                rows.append(torch.cat([e, rms(feature, self.t[f"{name}hidden_norm.weight"], EPS)]))
            x = rms(features[-1], self.t[f"{name}hidden_norm.weight"], EPS) if self.norm_first else features[-1]
            x = self.mlp(name, x + self.attend(name, rows))
            return rms(x, self.t["norm.weight"], EPS) if self.norm_output else x
        xs = [self.fuse(f, t) for f, t in zip(features, tokens, strict=True)]
        for index in range(self.made.config["num_hidden_layers"]):
            name = f"layers.{index}."
            norm = self.t.get(f"{name}input_layernorm.weight")
            normed = xs if norm is None else [rms(x, norm, EPS) for x in xs]
            xs = [self.mlp(name, x + self.attend(name, normed[: i + 1])) for i, x in enumerate(xs)]
        return xs[-1]

    def enter(self, features: Tensor) -> list[Tensor]:
        """The target's features at the width that `predict` takes."""
        return [self.t["fc.weight"] @ f for f in features] if self.kind == "eagle3" else list(features)

    def logprobs(self, predicted: Tensor) -> dict[int, float]:
        """Log-probability of every token that can be proposed, by its id in the target."""
        if self.kind != "eagle3":
            return dict(enumerate((self.target_head @ predicted).log_softmax(-1).tolist()))
        normed = predicted if self.norm_output else rms(predicted, self.t["norm.weight"], EPS)
        values = (self.t["lm_head.weight"] @ normed).log_softmax(-1).tolist()
        offsets = self.t["d2t"].tolist() if "d2t" in self.t else [0] * len(values)
        return {index + offset: value for index, (offset, value) in enumerate(zip(offsets, values, strict=True))}

    def tree(self, features: Tensor, tokens: list[int], budget: TreeBudget) -> dict[tuple[int, ...], float]:
        """The tree by its definition: {path: cumulative log-probability}, root excluded."""
        candidates, frontier = {}, [((), 0.0)]
        for _ in range(budget.depth):
            level = {}
            for path, score in frontier:
                pairs, following = self.enter(features), list(tokens)
                for token in path:
                    pairs, following = [*pairs, self.predict(pairs, following)], [*following, token]
                likely = self.logprobs(self.predict(pairs, following))
                for token in sorted(likely, key=lambda t: -likely[t])[: budget.top_k]:
                    level[(*path, token)] = score + likely[token]
            candidates |= level
            frontier = sorted(level.items(), key=lambda item: -item[1])[: budget.top_k]
        return dict(sorted(candidates.items(), key=lambda item: -item[1])[: budget.nodes - 1])


@pytest.fixture(scope="module")
def target():
    return tiny_target("llama", num_hidden_layers=TARGET_LAYERS, name_or_path="some/target")


def made_and_loaded(name, directory, target, seed=0):
    torch.manual_seed(seed)
    made = FORMATS[name]()
    draft = DovetailDraft.from_pretrained(made.write(directory))
    draft.attach(target)
    return made, draft


@pytest.mark.torch_only("the reference reads a torch target's tables")
@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_forward_and_tree_are_the_published_equations(name, tmp_path, target):
    made, draft = made_and_loaded(name, tmp_path, target)
    reference = Reference(made, target.get_input_embeddings().weight, target.get_output_embeddings().weight)
    ids, features = text(made.states)
    out = draft(features=features[None], input_ids=ids[None, 1:])
    entered, following = reference.enter(features), ids[1:].tolist()
    for n in range(1, 6):
        wanted = reference.predict(entered[:n], following[:n])
        torch.testing.assert_close(out.features[0, n - 1], wanted, atol=1e-5, rtol=1e-5)
    budget = TreeBudget(9, 3, 3)
    drafter = FeatureDrafter(draft, TorchRunner(draft), capacity=64, clock=PhaseClock())
    drafter.begin(features, ids)
    tree = drafter.grow(budget)
    paths, found = [], {}
    for token, parent, score in zip(*(t.tolist() for t in (tree.tokens, tree.parents, tree.scores)), strict=True):
        paths.append((*paths[parent], token) if parent >= 0 else ())
        found[paths[-1]] = score
    del found[()]
    assert found == pytest.approx(reference.tree(features, following, budget), abs=1e-5)


@pytest.mark.torch_only("features of single layers")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("verification", ["tree", "stock"])
def test_generates_the_plain_text(name, verification, tmp_path, target):
    if verification == "stock":
        pytest.importorskip("transformers", minversion="5.8")
    made, draft = made_and_loaded(name, tmp_path, target)
    assert draft.config.layers_of(target.config) == made.states
    draft.verification = verification
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(
        target.generate(prompt(), assistant_model=draft, **options), target.generate(prompt(), **options)
    )
    assert not draft.report.warnings


@pytest.mark.torch_only("features of single layers")
@torch.no_grad()
def test_features_are_the_hidden_states_that_the_config_names(tmp_path, target):
    """The drafter receives `hidden_states[i]`, in the numbering of transformers, concatenated."""
    _, draft = made_and_loaded("eagle3, other layers", tmp_path, target)
    seen = []
    project = draft.project
    draft.project = lambda features: (seen.append(features.clone()), project(features))[1]
    ids = target.generate(prompt(), assistant_model=draft, max_new_tokens=12, do_sample=False)
    states = target(ids, output_hidden_states=True).hidden_states
    wanted = torch.cat([states[i][0] for i in (1, 3, 7)], dim=-1)
    found = torch.cat(seen)
    torch.testing.assert_close(found, wanted[: len(found)], atol=1e-5, rtol=1e-5)
    assert len(found) > prompt().shape[1]


@pytest.mark.parametrize("name", FORMATS)
def test_saved_and_loaded_again(name, tmp_path, target):
    _, draft = made_and_loaded(name, tmp_path, target)
    draft.save_pretrained(tmp_path / "ours")
    again = DovetailDraft.from_pretrained(tmp_path / "ours")
    assert again.config.fusion == draft.config.fusion
    state = draft.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    assert len(state) == len(again.state_dict())


def test_a_head_for_fewer_positions_is_used_beyond_them(tmp_path, target, caplog):
    """max_position_embeddings is 64 in these files and 512 in the target."""
    _, draft = made_and_loaded("eagle3", tmp_path, target)
    assert "64 positions and the target has 512: the draft is used up to the target's length" in caplog.text
    ids = prompt(100)
    options = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(target.generate(ids, assistant_model=draft, **options), target.generate(ids, **options))
    assert not draft.report.warnings


BROKEN = {
    "no format": (lambda m: m.tensors.clear() or m.tensors.update(a=weight(2, 2)), "Supported: W_1 and W_z"),
    "missing and misshapen": (
        lambda m: m.tensors.pop("midlayer.mlp.up_proj.weight") is None or m.tensors.update({"norm.weight": weight(3)}),
        r"missing: layers.0.mlp.up_proj.weight.*wrong shape: norm.weight is \(3,\), expected \(32,\)",
    ),
    "extra": (lambda m: m.tensors.update({"midlayer.gamma": weight(2)}), "unexpected: layers.0.gamma"),
    "d2t out of range": (lambda m: m.tensors["d2t"].__setitem__(-1, VOCAB), "outside the vocabulary of 97"),
    "d2t twice": (lambda m: m.tensors["d2t"].zero_().__setitem__(1, -1), "two draft tokens the same id"),
    "d2t missing": (lambda m: m.tensors.pop("d2t"), "d2t, which lists them, is missing"),
    "t2d differs": (lambda m: m.tensors["t2d"].zero_(), "t2d and d2t name different tokens"),
    "config lacks": (lambda m: m.config.pop("intermediate_size"), "its config lacks 'intermediate_size'"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_checkpoints(what, tmp_path):
    made = eagle3()
    change, message = BROKEN[what]
    change(made)
    with pytest.raises(ValueError, match=message):
        DovetailDraft.from_pretrained(made.write(tmp_path))


def test_an_unknown_format_is_refused_with_the_name_of_the_checkpoint(tmp_path):
    made = eagle3()
    made.tensors = {"a": weight(2, 2)}
    directory = str(made.write(tmp_path))
    with pytest.raises(UnknownFormat, match="the format of this draft is unknown") as refused:
        DovetailDraft.from_pretrained(directory)
    assert str(refused.value).startswith(f"{directory}: ")


def test_pickles_of_other_things_are_not_run(tmp_path):
    made = paper()
    made.tensors["W_1"] = print
    with pytest.raises(ValueError, match="a pickle with code, which is not run"):
        DovetailDraft.from_pretrained(made.write(tmp_path))


def test_damaged_files(tmp_path):
    made = eagle()
    made.write(tmp_path)
    whole = (tmp_path / made.file).read_bytes()
    (tmp_path / made.file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or not safetensors"):
        DovetailDraft.from_pretrained(tmp_path)
    (tmp_path / made.file).unlink()
    with pytest.raises(OSError, match="has no weights"):
        DovetailDraft.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="a JSON list, not an object"):
        DovetailDraft.from_pretrained(tmp_path)


def test_a_hub_out_of_reach_says_what_to_do(monkeypatch):
    with pytest.raises(OSError, match="give the directory"):
        DovetailDraft.from_pretrained("nobody/nothing-of-that-name", local_files_only=True)


def test_layers_that_the_target_does_not_have(tmp_path):
    made, small = eagle3(states=(1, 3, 7)), tiny_target("llama")
    draft = DovetailDraft.from_pretrained(made.write(tmp_path))
    with pytest.raises(ValueError, match=r"reads hidden states \(1, 3, 7\), but the target has 3 layers"):
        draft.attach(small)


def test_kinds():
    for name, make in FORMATS.items():
        made = make()
        names = [key.removeprefix("model.") for key in made.tensors]
        assert kind_of(made.config, names) == made.kind, name


def test_sharded_files(tmp_path):
    made = eagle()
    names = sorted(made.tensors)
    files = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, own in files.items():
        save_file({name: made.tensors[name] for name in own}, tmp_path / file)
    index = {"weight_map": {name: file for file, own in files.items() for name in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(made.config))
    tensors = load_checkpoint(str(tmp_path)).tensors
    assert torch.equal(tensors["fusion.fc.weight"], made.tensors["fc.weight"])
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(OSError, match=r"names two.safetensors, which is missing"):
        load_checkpoint(str(tmp_path))
