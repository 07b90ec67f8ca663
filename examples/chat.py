"""Chat with a model over several turns. Target and draft read only the new tokens of each turn.

python examples/chat.py                                  # an empty line ends the chat
python examples/chat.py --say "A pen costs 3 dollars. How much do 12 pens cost?" --say "And 20 pens?"
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextStreamer

from dovetail_plugin import DovetailDraft

PAIR = Path(__file__).parent / "tiny_pair"

parser = argparse.ArgumentParser(description="Chat with a target and its draft.")
parser.add_argument("--target", default=str(PAIR / "dovetail-tiny-target"))
parser.add_argument("--draft", default=str(PAIR / "dovetail-tiny-draft"))
parser.add_argument("--say", action="append", help="a message, instead of typing; may be repeated")
parser.add_argument("--max-new-tokens", type=int, default=256)
args = parser.parse_args()

target = AutoModelForCausalLM.from_pretrained(args.target, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(args.target)
draft = DovetailDraft.from_pretrained(args.draft, device_map="auto")
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
options = {"assistant_model": draft, "streamer": streamer, "max_new_tokens": args.max_new_tokens}

cache, seen, chat = DynamicCache(config=target.config), None, []
for message in args.say or iter(lambda: input("> "), ""):
    chat.append({"role": "user", "content": message})
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = inputs["input_ids"]
    if seen is not None and not torch.equal(ids[:, : seen.shape[1]], seen):
        cache = DynamicCache(config=target.config)  # the text does not begin with what the cache holds
    seen = target.generate(**inputs, **options, past_key_values=cache)
    chat.append({"role": "assistant", "content": tokenizer.decode(seen[0, ids.shape[1] :], skip_special_tokens=True)})
    print(f"[{draft.report.tokens_per_s:.1f} tokens/s, {draft.report.acceptance_length:.2f} tokens per round]")
