"""Options about how an answer is drawn, as `lathe chat` and `lathe generate` take them, and the request's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "--temp",
        min=0.0,
        help="0 is greedy. What the server has, if left out; so are these:",
    ),
]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0)]
TopK = Annotated[int | None, typer.Option(min=0)]
MinP = Annotated[float | None, typer.Option(min=0.0, max=1.0)]
TopNSigma = Annotated[float | None, typer.Option(min=0.0)]
XtcProbability = Annotated[float | None, typer.Option(min=0.0, max=1.0)]
XtcThreshold = Annotated[float | None, typer.Option(min=0.0, max=0.5)]
RepetitionPenalty = Annotated[float | None, typer.Option(min=0.0)]
PresencePenalty = Annotated[float | None, typer.Option(min=-2.0, max=2.0)]
FrequencyPenalty = Annotated[float | None, typer.Option(min=-2.0, max=2.0)]
EnableThinking = Annotated[bool | None, typer.Option(help="Whether to think before answering.")]
ThinkingBudget = Annotated[int | None, typer.Option(min=0, help="Tokens of thoughts at most.")]
Seed = Annotated[int | None, typer.Option(help="The same answers again.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-m", min=1)]

FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "top_n_sigma", "xtc_probability", "xtc_threshold"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "enable_thinking", "thinking_budget"),
    *("seed", "max_tokens"),
)


def fields_given(params: Mapping[str, Any]) -> dict[str, Any]:
    """Of a command's parameters, as typer has them, those that were given and are fields of a request."""
    return {name: params[name] for name in FIELDS if params[name] is not None}
