"""The base of a run: a recipe in, a loaded model that it can train out."""

from __future__ import annotations

from serve.errors import ConfigError
from serve.model.loading import LoadedModel, build_random, load, resolve
from serve.model.packed import packing_problem
from train.recipe.recipe import Recipe


def load_base(recipe: Recipe) -> LoadedModel:
    """The recipe's model, with stored or random weights. ConfigError where it cannot train as the recipe asks."""
    if recipe.init == "random":
        model = build_random(resolve(recipe.model), recipe.seed, name=recipe.model)
    else:
        model = load(recipe.model, quantize=recipe.quantize, trust_remote_code=recipe.trust_remote_code)
    _check(recipe, model)
    return model


def _check(recipe: Recipe, model: LoadedModel) -> None:
    if recipe.fine_tune_type == "full" and "quantization" in model.config:
        raise ConfigError(
            f"fine_tune_type: full needs a base in full precision; {recipe.model} is quantized. Use "
            f"fine_tune_type: lora, or the model it was quantized from"
        )
    problem = packing_problem(model.network, recipe.max_seq_length) if recipe.sample_packing else None
    if problem:
        raise ConfigError(
            f"sample_packing: {recipe.model} cannot be packed: {problem}. Write sample_packing: false; batches "
            f"then go by length, which leaves about 5 % padding"
        )
