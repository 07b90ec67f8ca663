"""Generate the same text without and with a draft, and compare text and speed.

python examples/compare.py
python examples/compare.py --target Qwen/Qwen3-8B --draft RedHatAI/Qwen3-8B-speculator.eagle3
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dovetail_plugin import DovetailDraft

PAIR = Path(__file__).parent / "tiny_pair"

parser = argparse.ArgumentParser(description="Compare plain generation with drafted generation.")
parser.add_argument("--target", default=str(PAIR / "dovetail-tiny-target"))
parser.add_argument("--draft", default=str(PAIR / "dovetail-tiny-draft"))
parser.add_argument("--prompt", default="A train travels 60 miles per hour for 3 hours. How far does it travel?")
parser.add_argument("--max-new-tokens", type=int, default=128)
args = parser.parse_args()

target = AutoModelForCausalLM.from_pretrained(args.target, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(args.target)
draft = DovetailDraft.from_pretrained(args.draft, device_map="auto")
chat = [{"role": "user", "content": args.prompt}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

texts = []
for name, options in [("plain", {}), ("with the draft", {"assistant_model": draft})]:
    target.generate(**inputs, **options, max_new_tokens=4)  # the first call sets things up and measures the machine
    start_s = time.perf_counter()
    texts.append(target.generate(**inputs, **options, do_sample=False, max_new_tokens=args.max_new_tokens))
    new_tokens = texts[-1].shape[1] - inputs["input_ids"].shape[1]
    print(f"{name}: {new_tokens / (time.perf_counter() - start_s):.1f} tokens/s")

print("identical text:", "yes" if torch.equal(*texts) else "no (bf16 can differ where two tokens tie)")
print(draft.report.summary())
print(tokenizer.decode(texts[1][0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
