"""The text of the bundled pair: GSM8K problems and code instructions as two-message chats.

Enters: the two files in `data/` (see `data/README.md` for sources and licences). Leaves: lists of
chats, split into train and held-out, and the tokenizer trained on them. Knows nothing of models.
"""

import argparse
import gzip
import json
import random
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

DATA = Path(__file__).parent / "data"
SPECIAL_TOKENS = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CALCULATOR_MARK = re.compile(r"<<[^>]*>>")

Chat = list[dict[str, str]]


def chat(user: str, assistant: str) -> Chat:
    """One exchange in the message format of transformers' chat templates."""
    return [
        {"role": "user", "content": user.strip()},
        {"role": "assistant", "content": assistant.strip()},
    ]


def load_chats(*, held_out: int = 100, seed: int = 0) -> tuple[list[Chat], list[Chat]]:
    """Return (train, held-out) chats, shuffled; `held_out` of each source are kept apart."""
    with gzip.open(DATA / "gsm8k-train.jsonl.gz", "rt", encoding="utf-8") as lines:
        maths = [json.loads(line) for line in lines]
    with gzip.open(DATA / "codegen-instruct.json.gz", "rt", encoding="utf-8") as file:
        code = json.load(file)
    sources = [
        [chat(row["question"], _CALCULATOR_MARK.sub("", row["answer"])) for row in maths],
        [chat(f"{row['instruction']}\n{row['input']}", row["response"]) for row in code],
    ]
    train = [c for source in sources for c in source[held_out:]]
    rest = [c for source in sources for c in source[:held_out]]
    random.Random(seed).shuffle(train)
    return train, rest


def train_tokenizer(chats: list[Chat], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the chats; digits stay single so that sums are spelt one way only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((m["content"] for c in chats for m in c), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Write the training chats as JSON lines, for `dovetail train --data`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file to write, .jsonl")
    args = parser.parse_args()
    train, _ = load_chats()
    with open(args.out, "w", encoding="utf-8") as file:
        for messages in train:
            file.write(json.dumps({"messages": messages}) + "\n")
    print(f"{len(train)} chats written to {args.out}")


if __name__ == "__main__":
    main()
