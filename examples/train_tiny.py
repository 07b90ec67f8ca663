"""Train a draft in seconds: a tiny target with random weights learns nothing useful, but shows every step.

python examples/train_tiny.py --out my-draft
python examples/train_tiny.py --target DIR --data chats.jsonl --out my-draft --steps 2000     # a real one
"""

import argparse
import json
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dovetail_plugin.training import TrainingConfig, train

TOKENIZER = Path(__file__).parent / "tiny_pair" / "dovetail-tiny-target"

parser = argparse.ArgumentParser(description="Train a small draft.")
parser.add_argument("--target", help="default: a tiny model with random weights")
parser.add_argument("--data", type=Path, help="default: a few sentences")
parser.add_argument("--out", type=Path, default=Path("my-draft"))
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

target, data = args.target, args.data
if target is None:
    target = f"{args.out}-target"
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(target)
    tokenizer.save_pretrained(target)
if data is None:
    data = Path(f"{args.out}-data.jsonl")
    lines = [{"prompt": f"What is {n} plus {n}?", "completion": f"{n} plus {n} is {2 * n}."} for n in range(64)]
    data.write_text("\n".join(map(json.dumps, lines)))

config = TrainingConfig(
    target=target, data=(data,), out=args.out, steps=args.steps, batch_size=8, max_length=256, held_out=8, eval_every=10
)
draft = train(config)
print(f"draft with {draft.num_parameters():,} parameters saved to {args.out}")
