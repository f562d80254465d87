"""What a server is told of a model that encodes texts. A block of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from serve.settings import Strict

Kind = Literal["auto", "embedding", "classifier", "yes_no"]
PoolingMode = Literal["cls", "mean", "max", "last", "mean_sqrt_len", "weighted_mean"]


class EmbeddingModelConfig(Strict):
    """A model whose answer to a text is a vector, or to a pair of texts a score."""

    name: str = Field(min_length=1)
    """What requests put into `model`."""
    model: str = Field(min_length=1)
    """A local folder or a hub name."""
    kind: Kind = "auto"
    """embedding: a vector of one text. classifier: a score of a query and a document read together, by a model of
    one label. yes_no: the same, by how much surer a language model is of the token yes than of no. auto: as the
    folder says; a folder that says nothing is an embedding model."""
    pooling: PoolingMode | None = None
    """How a text's vector is made of its tokens' states; as the folder says, if left out, else the mean of an
    encoder's and the last of a language model's."""
    normalize: bool | None = None
    """Whether vectors have length 1; as the folder says, if left out, and yes where it says nothing."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens of one text; what the model was made for, if left out."""
    truncate: bool = False
    """What is longer is cut, and not refused, where a request does not say (`truncate_prompt_tokens`)."""
    dimensions: bool | tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Whether vectors may be cut to the `dimensions` that a request names, or the lengths that it may name
    (Matryoshka). As the folder says, if left out, and not where it says nothing."""
    prompts: dict[str, str] | None = None
    """Texts that are put before an input, by the name that a request calls them (`prompt_name`); the folder's, if
    left out. `query` and `document` stand before those of a rerank."""
    default_prompt: str | None = None
    """The name of that of requests that name none; the folder's, if left out."""
    instruction: str | None = None
    """yes_no: what a document is judged by, unless a request says; the family's own words, if left out."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """What to compute in; float32 on CPU and as stored elsewhere, if left out."""
