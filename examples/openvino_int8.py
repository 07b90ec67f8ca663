"""Generate with an int8 OpenVINO target on the CPU, the fastest setting for most CPUs.

dovetail export --target Qwen/Qwen3-8B --to openvino --weights int8 --out my-model-int8
python examples/openvino_int8.py --target my-model-int8 --draft RedHatAI/Qwen3-8B-speculator.eagle3
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoTokenizer, TextStreamer

from dovetail_plugin import DovetailDraft

DRAFT = Path(__file__).parent / "tiny_pair" / "dovetail-tiny-draft"

parser = argparse.ArgumentParser(description="Generate with an exported OpenVINO target.")
parser.add_argument("--target", required=True, help="directory that `dovetail export --to openvino` wrote")
parser.add_argument("--draft", default=str(DRAFT), help="default: the draft of the bundled pair")
parser.add_argument("--prompt", default="A train travels 60 miles per hour for 3 hours. How far does it travel?")
parser.add_argument("--max-new-tokens", type=int, default=128)
args = parser.parse_args()

try:
    from dovetail_plugin.adapters.openvino import OpenVINOTarget
except ImportError as error:
    sys.exit(f"This example needs OpenVINO: pip install '.[openvino]' in a checkout of Dovetail. ({error})")

target = OpenVINOTarget.from_pretrained(args.target)
tokenizer = AutoTokenizer.from_pretrained(args.target)
draft = DovetailDraft.from_pretrained(args.draft, device_map="auto")

chat = [{"role": "user", "content": args.prompt}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
target.generate(**inputs, assistant_model=draft, max_new_tokens=args.max_new_tokens, streamer=streamer)
print(draft.report)
