"""A model of a configuration in, one that maps texts to vectors, or pairs of texts to scores, out.

Tokens are made on any one thread at a time; `run` is for the thread that owns the arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer

from serve.embed.config import EmbeddingModelConfig, PoolingMode
from serve.embed.encoders import Batch, Encoder, load_encoder
from serve.embed.folder import FolderSays, chosen, read_folder
from serve.embed.pooling import ACTIVATIONS, normalized, pool
from serve.errors import ContextLengthError, ModelError, RequestError
from serve.model.loading import read_config, resolve

Rows = npt.NDArray[np.float32]
CLASSIFIER_END = "ForSequenceClassification"
UNBOUNDED = 10**6
"""What a tokenizer says of its longest text where it knows nothing is more."""
MAX_TOKENS = 8192
"""Of a text, where nobody says."""
CHARS_A_TOKEN = 64
"""A text of more characters for each token that fits is looked at by its beginning."""
INPUT = "input"
"""Where a text stands in a request that does not say."""
QUERY = ("query",)
DOCUMENT = ("document", "passage", "corpus")
"""Names of prompts that stand before what is looked for, and before what is looked through."""
JUDGED = "Given a web search query, retrieve relevant passages that answer the query"
SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the "
    'answer can only be "yes" or "no".'
)
PREFIX = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""Qwen3-Reranker's words."""


@dataclass(frozen=True)
class Encoded:
    """One row: the tokens of a text, or of a pair."""

    token_ids: tuple[int, ...]
    num_first: int
    """Tokens before the second text of a pair; all of them of a text."""
    num_prompt: int = 0
    """Tokens of the prompt at its beginning that the vector leaves out."""
    normalize: bool | None = None
    """The vector is to have length 1, or the one that it has; None: as the model's folder says."""


@dataclass(frozen=True)
class Length:
    """How long a row may be."""

    limit: int | None = None
    """Tokens of it that are kept; None: one that is longer than the model can read is refused."""
    is_left: bool = False
    """Its end is kept, not its beginning."""


@dataclass(frozen=True)
class Side:
    """One text of a pair."""

    text: str
    place: str
    """Where it stands in a request, for errors."""


class TextModel:
    """One that is loaded."""

    truncates = False
    """What is too long is cut where a request does not say."""

    def __init__(self, name: str, path: Path, tokenizer: Any, encoder: Encoder, said: FolderSays) -> None:
        self.name = name
        self.path = path
        self.tokenizer = tokenizer
        self.said = said
        self.max_tokens = _longest(said, encoder, tokenizer)
        self.vocab_size = encoder.vocab_size
        self._encoder = encoder

    def text(
        self, text: str, length: Length, *, prompt: str = "", adds_special: bool = True, place: str = INPUT
    ) -> Encoded:
        """The row of a text behind a prompt. ContextLengthError if it is too long, RequestError if it is empty.

        place  where it stands in the request, for errors
        """
        whole = self._case(prompt + text)
        self._check_chars(whole, length, place)
        ids = self._ids(whole, adds_special)
        num_prompt = self._num_prompt_tokens(prompt) if prompt and not self.said.pools_prompt else 0
        room = self._room(length)
        if len(ids) > room:
            self._check_length(len(ids), length, place)
            num_special = len(self._ids("", adds_special)) if adds_special else 0
            ids = _cut(ids, room, self._num_special_at_ends(adds_special, num_special), length.is_left)
        return self._row(tuple(ids), len(ids), min(num_prompt, max(len(ids) - 1, 0)), place)

    def beginning(self, text: str, num_tokens: int) -> str:
        """What the first so many tokens of a text stand for; all of it, if it has no more."""
        text = self._case(text)[: CHARS_A_TOKEN * num_tokens]
        if not self.tokenizer.is_fast:  # one that does not say where its tokens stand
            ids = self._ids(text, False)
            return text if len(ids) <= num_tokens else str(self.tokenizer.decode(ids[:num_tokens]))
        told = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in told["offset_mapping"]]
        return text if len(ends) <= num_tokens else text[: ends[num_tokens - 1]]

    def all_ids(self, text: str, adds_special: bool) -> list[int]:
        """A text's tokens, however many. ContextLengthError for one that is too long by far."""
        self._check_chars(text, Length())
        return self._ids(self._case(text), adds_special)

    def ids(self, token_ids: Sequence[int], length: Length) -> Encoded:
        """The row of tokens that a client made. RequestError if one is none of the model's."""
        wrong = next((token for token in token_ids if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise RequestError(
                f"input: found token {wrong}; tokens of {self.name!r} are 0 to {self.vocab_size - 1}. Send text, "
                "where a client makes tokens of another vocabulary (LangChain: check_embedding_ctx_length=False)",
                "input",
            )
        room = self._room(length)
        if len(token_ids) > room:
            self._check_length(len(token_ids), length)
            token_ids = token_ids[-room:] if length.is_left else token_ids[:room]
        return self._row(tuple(token_ids), len(token_ids), 0)

    def batch(self, rows: Sequence[Encoded]) -> Batch:
        """Rows beside each other."""
        width = max(len(row.token_ids) for row in rows)
        tokens = np.full((len(rows), width), self._encoder.pad_id, np.int32)
        types = np.zeros((len(rows), width), np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row.token_ids)] = row.token_ids
            types[index, row.num_first : len(row.token_ids)] = 1
        lengths = mx.array([len(row.token_ids) for row in rows], dtype=mx.int32)
        return Batch(mx.array(tokens), lengths, mx.array(types))

    def run(self, rows: Sequence[Encoded]) -> Rows:
        """[B, O] of so many rows; on the thread that owns the arrays."""
        raise NotImplementedError

    def _case(self, text: str) -> str:
        return text.strip().lower() if self.said.is_lower_case else text

    def _ids(self, text: str, adds_special: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=adds_special, verbose=False))

    def _row(self, ids: tuple[int, ...], num_first: int, num_prompt: int, place: str = INPUT) -> Encoded:
        if not ids:
            raise RequestError(
                f"{place}: found a text of no tokens, which {self.name!r} makes no vector of", _field(place)
            )
        return Encoded(ids, num_first, num_prompt)

    def _num_prompt_tokens(self, prompt: str) -> int:
        """As sentence-transformers counts them: with the tokens that every text begins with."""
        ids = self._ids(prompt, True)
        return len(ids) - (1 if ids and ids[-1] in self.tokenizer.all_special_ids else 0)

    def _num_special_at_ends(self, adds_special: bool, num_special: int) -> tuple[int, int]:
        """Tokens that the tokenizer puts before and behind every text."""
        if not adds_special or not num_special:
            return 0, 0
        marked = self.tokenizer("a", add_special_tokens=True, return_special_tokens_mask=True)[
            "special_tokens_mask"
        ]
        before = next((i for i, is_special in enumerate(marked) if not is_special), 0)
        return before, num_special - before

    def _room(self, length: Length) -> int:
        return self.max_tokens if length.limit is None else min(length.limit, self.max_tokens)

    def _check_length(self, num_tokens: int, length: Length, place: str = INPUT) -> None:
        if length.limit is None:
            named = "your input" if place == INPUT else place
            raise ContextLengthError(
                f"This model's maximum context length is {self.max_tokens} tokens. However, {named} has "
                f"{num_tokens} tokens. truncate_prompt_tokens: -1 keeps as many as fit",
                _field(place),
            )

    def _check_chars(self, text: str, length: Length, place: str = INPUT) -> None:
        """Tokens of a very long text are not made where its beginning is too long already."""
        first = CHARS_A_TOKEN * self.max_tokens
        if length.limit is None and len(text) > first:
            num_tokens = len(self._ids(text[:first], False))
            if num_tokens > 2 * self.max_tokens:
                self._check_length(num_tokens, length, place)


class Embedder(TextModel):
    """A text's vector."""

    def __init__(self, name: str, path: Path, tokenizer: Any, encoder: Encoder, said: FolderSays) -> None:
        super().__init__(name, path, tokenizer, encoder, said)
        default: PoolingMode = "last" if encoder.is_causal else "mean"
        self.modes = said.pooling or (default,)
        self.is_normalized = said.is_normalized is not False
        self._dense = [(_load_dense(layer.path), ACTIVATIONS[layer.activation]) for layer in said.dense]
        self.width = self.run([Encoded((0, 0), 2)]).shape[1]
        """Numbers of a vector."""

    def run(self, rows: Sequence[Encoded]) -> Rows:
        """[B, width]"""
        batch = self.batch(rows)
        skipped = mx.array([row.num_prompt for row in rows], dtype=mx.int32)
        vectors = pool(self._encoder.states(batch), batch.lengths, skipped, self.modes)
        for layer, activation in self._dense:
            vectors = activation(layer(vectors))
        if any(is_normalized := [self._normalizes(row.normalize) for row in rows]):
            vectors = mx.where(mx.array(is_normalized)[:, None], normalized(vectors), vectors)
        return np.array(vectors)

    def prompt(self, name: str | None) -> str:
        """The text that stands before an input. RequestError names those there are."""
        said = self.said
        name = said.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in said.prompts:
            there = f"there are {', '.join(said.prompts)}" if said.prompts else "it has none"
            raise RequestError(f"prompt_name: found {name!a:.80}; of {self.name!r} {there}", "prompt_name")
        return said.prompts[name]

    def side(self, names: Sequence[str]) -> str:
        """The prompt of one side of a search, by its usual names; the default's where there is none."""
        name = next((name for name in names if name in self.said.prompts), None)
        return self.prompt(name)

    def check_dimensions(self, dimensions: int | None) -> None:
        """RequestError unless a vector may be cut to so many numbers."""
        cut = self.said.cut
        if dimensions is None or dimensions == self.width:
            return
        if dimensions > self.width:
            raise RequestError(
                f"dimensions: found {dimensions}; vectors of {self.name!r} have {self.width}", "dimensions"
            )
        if cut is False:
            raise RequestError(
                f"dimensions: found {dimensions}; vectors of {self.name!r} have {self.width}, and nothing says that "
                "they may be cut (Matryoshka): set `dimensions` of it in the server's embedding_models",
                "dimensions",
            )
        if isinstance(cut, tuple) and dimensions not in cut:
            raise RequestError(
                f"dimensions: found {dimensions}; those of {self.name!r} are {', '.join(map(str, cut))} and "
                f"{self.width}",
                "dimensions",
            )

    def cut(self, vectors: Rows, dimensions: int | None, normalize: bool | None = None) -> Rows:
        """The beginnings of vectors, of length 1 again where whole ones are."""
        if dimensions is None or dimensions == self.width:
            return vectors
        vectors = vectors[:, :dimensions]
        if not self._normalizes(normalize):
            return vectors
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.maximum(lengths, 1e-12)

    def _normalizes(self, asked: bool | None) -> bool:
        return self.is_normalized if asked is None else asked

    def similarity(self, queries: Rows, documents: Rows) -> npt.NDArray[np.float64]:
        """[B] of [B, width] each: how near they are, as the folder says it; cosine, if it does not."""
        a, b = queries.astype(np.float64), documents.astype(np.float64)
        kind = self.said.similarity
        if kind == "dot":
            return (a * b).sum(axis=1)
        if kind == "euclidean":
            return -np.linalg.norm(a - b, axis=1)
        if kind == "manhattan":
            return -np.abs(a - b).sum(axis=1)
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        return (a * b).sum(axis=1) / np.maximum(lengths, 1e-12)


class Scorer(TextModel):
    """A score of a query and a document that are read together."""

    def pair(self, query: Side, document: Side, length: Length, instruction: str | None) -> Encoded:
        """Their row. Where it is too long the document is cut, if that is allowed."""
        raise NotImplementedError

    def _check_pair(self, query: Side, document: Side, length: Length) -> None:
        for side in (query, document):
            self._check_chars(self._case(side.text), length, side.place)


class Classifier(Scorer):
    """By a model of one label."""

    def __init__(self, name: str, path: Path, tokenizer: Any, encoder: Encoder, said: FolderSays) -> None:
        super().__init__(name, path, tokenizer, encoder, said)
        self._activation = ACTIVATIONS[said.activation or "Sigmoid"]

    def pair(self, query: Side, document: Side, length: Length, instruction: str | None) -> Encoded:
        """As the tokenizer joins two texts."""
        if instruction is not None:
            raise RequestError(f"instruction: {self.name!r} is a classifier and takes none", "instruction")
        self._check_pair(query, document, length)
        room = self._room(length)
        made = self.tokenizer(self._case(query.text), self._case(document.text), verbose=False)
        if len(made["input_ids"]) > room:
            self._check_length(len(made["input_ids"]), length, _together(query, document))
            made = self._cut_pair(query, document, room)
        ids, types = list(made["input_ids"]), list(made.get("token_type_ids") or ())
        num_first = types.index(1) if 1 in types else len(ids)
        return self._row(tuple(ids), num_first, 0)

    def _cut_pair(self, query: Side, document: Side, room: int) -> Any:
        """Both, the document no longer than there is room."""
        asked = self._case(query.text)
        alone = len(self.tokenizer(asked, "", verbose=False)["input_ids"])
        if alone >= room:
            raise RequestError(
                f"{query.place}: with what stands around it, it has {alone} tokens, which leaves no room for a "
                f"document within {room}; make it shorter",
                _field(query.place),
            )
        return self.tokenizer(asked, self._case(document.text), truncation="only_second", max_length=room)

    def run(self, rows: Sequence[Encoded]) -> Rows:
        """[B, 1]"""
        return np.array(self._activation(self._encoder.labels(self.batch(rows)).astype(mx.float32)))


class YesNo(Scorer):
    """By how much surer a language model is of one token than of another."""

    def __init__(
        self,
        name: str,
        path: Path,
        tokenizer: Any,
        encoder: Encoder,
        said: FolderSays,
        instruction: str | None,
    ) -> None:
        super().__init__(name, path, tokenizer, encoder, said)
        yes, no = said.yes_no or (self._token("yes"), self._token("no"))
        self._token_ids = [yes] if no is None else [yes, no]
        self._instruction = instruction or said.prompts.get(said.default_prompt or "", JUDGED)
        self._activation = ACTIVATIONS[said.activation or "Sigmoid"]
        self._prefix, self._suffix = self._ids(PREFIX, False), self._ids(SUFFIX, False)

    def pair(self, query: Side, document: Side, length: Length, instruction: str | None) -> Encoded:
        """In Qwen3-Reranker's words. Where it is too long the document's end is left out."""
        self._check_pair(query, document, length)
        asked = (
            f"<Instruct>: {instruction or self._instruction}\n<Query>: {query.text}\n"
            f"<Document>: {document.text}"
        )
        ids = self._ids(asked, False)
        room = self._room(length) - len(self._prefix) - len(self._suffix)
        if len(ids) > room:
            num_tokens = len(ids) + len(self._prefix) + len(self._suffix)
            self._check_length(num_tokens, length, _together(query, document))
            if room < 1:
                raise RequestError(
                    "truncate_prompt_tokens: the words around a pair are "
                    f"{len(self._prefix) + len(self._suffix)} tokens; allow more",
                    "truncate_prompt_tokens",
                )
            ids = ids[:room]
        whole = (*self._prefix, *ids, *self._suffix)
        return self._row(whole, len(whole), 0)

    def run(self, rows: Sequence[Encoded]) -> Rows:
        """[B, 1]"""
        logits = self._encoder.logits(self.batch(rows), self._token_ids).astype(mx.float32)
        score = logits[:, :1] - logits[:, 1:] if len(self._token_ids) == 2 else logits
        return np.array(self._activation(score))

    def _token(self, word: str) -> int:
        ids = self._ids(word, False)
        if len(ids) != 1:
            raise ModelError(
                f"embedding model {self.name!r}: {word!r} is {len(ids)} tokens of its tokenizer, not one"
            )
        return ids[0]


def _field(place: str) -> str:
    """The field of a body that a place is in."""
    return place.partition(" ")[0].partition(".")[0]


def _together(query: Side, document: Side) -> str:
    """Their place, the longer one's first."""
    first, second = sorted((query, document), key=lambda side: -len(side.text))
    return f"{first.place} with {second.place}"


def load_text_model(config: EmbeddingModelConfig) -> TextModel:
    """Loaded, evaluated, and tried once. NotFoundError, ModelError."""
    path = resolve(config.model)
    outer = read_config(path) if (path / "config.json").exists() else {}
    said = chosen(read_folder(path, outer), config)
    inner = outer if said.backbone == path else read_config(said.backbone)
    kind = _kind(config, said, inner, path)
    if kind == "classifier" and _num_labels(inner) != 1:
        raise ModelError(
            f"embedding model {config.name!r}: {path} tells {_num_labels(inner)} labels apart; a score is of one"
        )
    encoder = load_encoder(
        said.backbone, inner, config.name, is_classifier=kind == "classifier", dtype=config.dtype
    )
    tokenizer = _load_tokenizer(said.backbone, config.name)
    model: TextModel
    if kind == "classifier":
        model = Classifier(config.name, path, tokenizer, encoder, said)
    elif kind == "yes_no":
        model = YesNo(config.name, path, tokenizer, encoder, said, config.instruction)
    else:
        model = Embedder(config.name, path, tokenizer, encoder, said)
    model.truncates = config.truncate
    return model


def _kind(config: EmbeddingModelConfig, said: FolderSays, inner: Mapping[str, Any], path: Path) -> str:
    classifies = any(str(each).endswith(CLASSIFIER_END) for each in inner.get("architectures") or ())
    if config.kind == "auto":
        if said.yes_no is not None:
            return "yes_no"
        return "classifier" if classifies and not said.pooling else "embedding"
    if config.kind == "classifier" and not classifies:
        raise ModelError(
            f"embedding model {config.name!r}: {path} is no classifier: its architectures are "
            f"{inner.get('architectures') or 'not said'}"
        )
    return config.kind


def _num_labels(inner: Mapping[str, Any]) -> int:
    return int(inner.get("num_labels") or len(inner.get("id2label") or (None, None)))


def _longest(said: FolderSays, encoder: Encoder, tokenizer: Any) -> int:
    """Tokens of one text at most."""
    known = getattr(tokenizer, "model_max_length", None)
    if not isinstance(known, int) or not 0 < known < UNBOUNDED:
        known = None
    wanted = said.max_tokens or known or encoder.max_tokens or MAX_TOKENS
    return min(wanted, encoder.max_tokens or wanted)


def _load_tokenizer(path: Path, name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"embedding model {name!r}: its tokenizer cannot be loaded: {error}") from error


def _load_dense(folder: Path) -> nn.Linear:
    file = folder / "model.safetensors"
    if not file.exists():
        raise ModelError(f"{folder}: has no model.safetensors; pickled weights are not read")
    weights = mx.load(str(file))
    assert isinstance(weights, dict)
    outputs, inputs = weights["linear.weight"].shape
    layer = nn.Linear(inputs, outputs, bias="linear.bias" in weights)
    layer.load_weights(
        [(key.removeprefix("linear."), value.astype(mx.float32)) for key, value in weights.items()]
    )
    mx.eval(layer.parameters())
    return layer


def _cut(ids: list[int], room: int, ends: tuple[int, int], is_left: bool) -> list[int]:
    """So many of them, those at the ends that every text has among them."""
    before, behind = ends
    if before + behind > room:
        return ids[:room]
    head, tail = ids[:before], ids[len(ids) - behind :] if behind else []
    inside = ids[before : len(ids) - behind]
    kept = room - before - behind
    inside = (inside[-kept:] if kept else []) if is_left else inside[:kept]
    return [*head, *inside, *tail]
