"""What of a run is drawn: its measures by name → panels of lines. Knows no files and draws nothing.

The first panel is what the objective is about, the others what one looks at when that goes wrong: TRL's measures,
grouped as its users group them on a board.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

TRAIN, VALID, RATE, NORM, OTHER = "#4c78a8", "#e45756", "#54a24b", "#b279a2", "#f2a33a"
MOST_RATES = 1000
"""Points of the learning rate's line."""

Points = Sequence[tuple[int, float]]
Curves = Mapping[str, Points]


@dataclass(frozen=True)
class Line:
    """A curve. `spread`: by step, how far to either side values go; `is_noisy`: of single batches."""

    label: str
    points: Points
    color: str
    is_noisy: bool = False
    is_marked: bool = True
    style: str = "-"
    spread: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """Lines on one axis, all in the same unit. `star`: a point to mark, with its label."""

    title: str
    lines: Sequence[Line]
    limits: tuple[float, float] | None = None
    from_zero: bool = False
    may_be_logarithmic: bool = False
    star: tuple[tuple[int, float], str] | None = None


def panels_of(train: Curves, valid: Curves, rates: Sequence[float] = ()) -> list[Panel]:
    """The panels of a run, the large one first. `rates`: the learning rate of each step, where it is known."""
    is_grpo = "reward" in train or "reward" in valid
    panels = _rewarded(train, valid) if is_grpo else _learned(train, valid)
    return [
        panel for panel in (*panels, *_optimizer(train, rates)) if any(line.points for line in panel.lines)
    ]


def _learned(train: Curves, valid: Curves) -> Iterator[Panel]:
    """sft and cpt: loss and accuracy. draft: loss, and how much is guessed. dpo, orpo and kto: how far and how often
    the better answer is ahead, too; orpo, which has no reference, shows its two parts."""
    loss = _both("loss", train, valid)
    star = _best(valid.get("loss", ()), 1, "lowest validation loss")
    yield Panel("loss", loss, from_zero=True, may_be_logarithmic=True, star=star)
    share = (-0.03, 1.05)
    answers = [Line("exact answers", valid.get("exact_match", ()), OTHER)]
    tokens = [Line("tokens", valid.get("mean_token_accuracy", ()), VALID)]
    yield Panel("accuracy of validation", [*tokens, *answers], share)
    for title, name, limits in (
        ("share of tokens that are guessed", "acceptance", share),
        ("guesses accepted, of 4 in a row", "accepted_of_4", (-0.1, 4.1)),
    ):
        ways = [("coupled", VALID), ("greedy", OTHER)]
        lines = [Line(way, valid.get(f"{name}/{way}", ()), color) for way, color in ways]
        yield Panel(title, lines, limits)
    yield Panel("accuracy: the better answer ahead", _both("rewards/accuracies", train, valid), share)
    yield Panel("margin of rewards", _both("rewards/margins", train, valid))
    # orpo's loss is the first of these, and what keeps the second from falling.
    yield Panel("likelihood: loss of chosen answers", _both("nll_loss", train, valid), from_zero=True)
    yield Panel("log odds of the better answer", _both("log_odds_chosen", train, valid))
    yield Panel("rewards", _pair("rewards", train))
    yield Panel("log-probabilities of answers", _pair("logps", train))
    yield Panel("KL from the reference", _both("kl", train, valid), from_zero=True)


def _rewarded(train: Curves, valid: Curves) -> Iterator[Panel]:
    """grpo: rewards, and not the loss, which is a surrogate without a meaning of its own."""
    means = train.get("reward", ())
    spread = dict(train.get("reward_std", ()))
    lines = [
        Line("answers in training, ± their spread", means, TRAIN, spread=spread),
        Line("greedy answers to validation prompts", valid.get("reward", ()), VALID),
    ]
    star = _best(valid.get("reward", ()), -1, "highest validation reward")
    yield Panel("reward", lines, star=star)
    yield Panel("tokens of an answer", _both("completions/mean_length", train, valid), from_zero=True)
    yield Panel("KL from the reference", _both("kl", train, valid), from_zero=True)
    shares = [
        Line("cut off", train.get("completions/clipped_ratio", ()), TRAIN),
        Line("groups scored alike", train.get("frac_reward_zero_std", ()), OTHER),
    ]
    yield Panel("share of answers", shares, (-0.03, 1.05))
    yield Panel("surrogate loss", [Line("training", train.get("loss", ()), TRAIN, is_noisy=True)])


def _optimizer(train: Curves, rates: Sequence[float]) -> Iterator[Panel]:
    """The rate of every step, so that a warm-up shorter than a report is seen; as reported where it is not known."""
    reported = train.get("learning_rate", ())
    last = max((step for step, _ in reported), default=0)
    every = max(-(-last // MOST_RATES), 1)
    steps = [step for step in range(1, last + 1) if step % every == 0 or step == 1]
    planned = [(step, rates[step - 1]) for step in steps if step <= len(rates)]
    lines = [Line("planned", planned, RATE, is_marked=False)] if planned else []
    yield Panel(
        "learning rate",
        lines or [Line("reported", reported, RATE)],
        from_zero=True,
    )
    yield Panel("gradient norm", [Line("training", train.get("grad_norm", ()), NORM)], from_zero=True)


def _both(name: str, train: Curves, valid: Curves) -> list[Line]:
    return [
        Line("training", train.get(name, ()), TRAIN, is_noisy=True),
        Line("validation", valid.get(name, ()), VALID),
    ]


def _pair(name: str, train: Curves) -> list[Line]:
    return [
        Line("chosen", train.get(f"{name}/chosen", ()), TRAIN, is_noisy=True),
        Line("rejected", train.get(f"{name}/rejected", ()), OTHER, is_noisy=True),
    ]


def _best(points: Points, sign: int, words: str) -> tuple[tuple[int, float], str] | None:
    """The point whose value times `sign` is lowest, of those after training began; the first of equals."""
    trained = [point for point in points if point[0] > 0]
    if not trained:
        return None
    step, value = min(trained, key=lambda point: sign * point[1])
    return (step, value), f"{words}: {value:.4g} at step {step:,}"
