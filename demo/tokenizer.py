"""Trains the tokenizer: byte-level BPE, digits one by one, DeepSeek's special tokens.

    python -m demo.tokenizer .data OUT_DIR

Writes `tokenizer.json` and `tokenizer_config.json`.
"""

import argparse
import json
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from demo.chat import ADDED_TOKENS, BOS, EOS, PAD, chat_template
from demo.mixture import TEXT_SHARES, Mixture, sample

VOCAB_SIZE = 4608
MAX_LENGTH = 4096
WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build(mixture: Mixture, rng: Random) -> Tokenizer:
    """Train on a sample of the mixture and of the raw text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(t, normalized=False, special=s) for t, s in ADDED_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    marks = [text for text, _ in ADDED_TOKENS]
    texts = list(sample(mixture, rng, 30000))
    for source, share in TEXT_SHARES.items():
        documents = mixture.texts[source]
        texts += rng.sample(documents, min(len(documents), int(share * 9000)))
    clean = []
    for text in texts:
        for mark in marks:
            text = text.replace(mark, "\n")
        clean.append(text)
    tokenizer.train_from_iterator(clean, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, 0)],
    )
    # the trainer marks every added token special; only three are
    data = json.loads(tokenizer.to_str())
    special = dict(ADDED_TOKENS)
    for token in data["added_tokens"]:
        token["special"] = special[token["content"]]
    return Tokenizer.from_str(json.dumps(data, ensure_ascii=False))


def tokenizer_config() -> dict[str, object]:
    """tokenizer_config.json in the published style, with the chat template inside."""

    def added(text: str, special: bool) -> dict[str, object]:
        return {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": special,
        }

    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): added(t, s) for i, (t, s) in enumerate(ADDED_TOKENS)},
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": chat_template(),
    }


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = build(Mixture(args.data), Random(20))
    tokenizer.save(str(args.out / "tokenizer.json"), pretty=False)
    text = json.dumps(tokenizer_config(), ensure_ascii=False, indent=2)
    (args.out / "tokenizer_config.json").write_text(text + "\n")
    print(tokenizer.get_vocab_size())


if __name__ == "__main__":
    main()
