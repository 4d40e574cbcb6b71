"""The words: a T5-style unigram tokenizer and a small T5 encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from .pictures import Emoji, all_captions

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as T5 has them
VOCABULARY = 2048
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'&:()!?-#"
CONFIG = {
    "d_model": 128,
    "d_kv": 32,
    "num_heads": 4,
    "d_ff": 256,
    "num_layers": 3,
    "num_decoder_layers": 0,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "is_encoder_decoder": False,
    "use_cache": False,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def train_tokenizer(emoji: Sequence[Emoji]) -> Tokenizer:
    """Pieces learned from every caption. Lower case; every letter is a piece, so that no word is unknown."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    space = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
    )
    tokenizer.decoder = decoders.Metaspace(**space)
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, UNKNOWN],
        unk_token=UNKNOWN,
        initial_alphabet=[*LETTERS, "▁"],
        show_progress=False,
    )
    texts = [text for e in emoji for text in all_captions(e)]
    tokenizer.train_from_iterator([*texts, *[letter for letter in LETTERS for _ in range(5)]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    assert [tokenizer.token_to_id(t) for t in (PAD, END, UNKNOWN)] == [0, 1, 2]
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, and what AutoTokenizer and T5TokenizerFast want beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")
    rules = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it stands; T5TokenizerFast drops its lower-casing
        "model_max_length": 512,
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": UNKNOWN,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(rules, indent=2) + "\n", encoding="utf-8")
    special = {"pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def new_encoder(vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=vocabulary, **CONFIG))


def batch_ids(captions: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """(B, longest + 1) ids padded with 0, and the number k of real tokens of each."""
    lengths = torch.tensor([len(ids) for ids in captions])
    ids = torch.zeros(len(captions), int(lengths.max()) + 1, dtype=torch.long)
    for row, caption in zip(ids, captions, strict=True):
        row[: len(caption)] = torch.tensor(caption)
    return ids, lengths


def embed(encoder: T5EncoderModel, ids: Tensor, lengths: Tensor) -> Tensor:
    """(B, tokens, width). The encoder attends the k real tokens; the pad after them is computed, for the transformer attends it."""
    real = torch.arange(ids.shape[1])[None] < lengths[:, None]
    return encoder(input_ids=ids, attention_mask=real.long())[0]
