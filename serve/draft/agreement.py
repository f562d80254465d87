"""Do two models mean the same by a token's id? A draft model's tokens are checked by the target as they are."""

from __future__ import annotations

from serve.errors import ConfigError
from serve.model.loading import LoadedModel
from serve.model.vocabulary import difference


def check_agreement(draft: LoadedModel, target: LoadedModel) -> None:
    """ConfigError that says what differs, where the tokenizers are not the same. Heads may be padded otherwise."""
    if found := difference(draft.tokenizer, target.tokenizer):
        raise ConfigError(
            f"draft model {draft.name} does not have the tokenizer of {target.name}, so it cannot guess for it: "
            f"in this order, {found}"
        )
