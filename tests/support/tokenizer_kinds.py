"""The kinds of tokenizers that there are, each of a few words."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

WORDS = ["Paris", "the", "a", "é", "日本", "🌍", "x", "1", ".", "\n", "<", "�"]


def byte_level() -> Tokenizer:
    """GPT-2's kind, merges of half characters included."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = [pre.pre_tokenize_str(word)[0][0] for word in ("日", "🌍", " the", "é")]
    merges, vocabulary = [], list(alphabet)
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                merges.append((word[: end - 1], word[end - 1]))
                vocabulary.append(word[:end])
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    return tokenizer


def byte_fallback(strips: bool) -> Tokenizer:
    """SentencePiece's kind: llama-2, mistral, phi-3 (a text's first space is left out), gemma (it is kept)."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    names += [prefix + word for word in WORDS for prefix in ("", "▁")] + list("abcdefghijklmnopqrstuvwxyz")
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    before = [normalizers.Prepend("▁")] if strips else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    after = [decoders.Strip(" ", 1, 0)] if strips else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """T5's kind: words with a mark in front, no bytes."""
    names = [prefix + word for word in WORDS for prefix in ("", "▁")]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((name, -1.0) for name in names)], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT's kind."""
    names = ["[UNK]", *WORDS, *(f"##{word}" for word in WORDS)]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


KINDS = {
    "byte-level": byte_level,
    "byte-fallback": lambda: byte_fallback(strips=True),
    "byte-fallback, no strip": lambda: byte_fallback(strips=False),
    "metaspace": metaspace,
    "word-piece": word_piece,
}
