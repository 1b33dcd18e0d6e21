"""Which predictions, losses, weightings and variances go together, and why others do not."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Literal, NamedTuple, get_args

from ddpm_lightning.diffusion.process import LEARNED_VARIANCES, Prediction, Variance
from ddpm_lightning.errors import InputError

Loss = Literal["simple", "vlb", "hybrid", "rescaled_hybrid"]
Weighting = Literal["none", "min_snr", "p2"]


class Combination(NamedTuple):
    """The options of the objective (see `Objective` and `Process`)."""

    prediction: Prediction
    loss: Loss
    weighting: Weighting
    variance: Variance


class Rule(NamedTuple):
    """Two options that do not go together where `applies`; the reason ends with the remedy."""

    options: tuple[str, str]
    applies: Callable[[Combination], bool]
    reason: str


RULES = (
    Rule(
        ("loss", "variance"),
        lambda c: c.loss == "simple" and c.variance in LEARNED_VARIANCES,
        "the squared error says nothing of a learned variance, which would stay as it was "
        "initialised; take loss hybrid, rescaled_hybrid or vlb, or a fixed variance",
    ),
    Rule(
        ("loss", "variance"),
        lambda c: "hybrid" in c.loss and c.variance not in LEARNED_VARIANCES,
        "in a hybrid the bound teaches the variance alone (its gradient through the mean is "
        "stopped), and a fixed one learns nothing; take loss simple or vlb, or a learned variance",
    ),
    Rule(
        ("weighting", "loss"),
        lambda c: c.weighting != "none" and c.loss != "simple",
        "the bound weighs its terms itself, and a hybrid's balance is that with the unweighted "
        "squared error; take weighting none or loss simple",
    ),
    Rule(
        ("weighting", "prediction"),
        lambda c: c.weighting == "min_snr" and c.prediction == "mu",
        "Hang et al. 2023 define it for the squared errors of noise, x_0 and v; predict one of "
        "these, or take weighting none",
    ),
    Rule(
        ("weighting", "prediction"),
        lambda c: c.weighting == "p2" and c.prediction != "noise",
        "Choi et al. 2022 define it for the squared error of the noise; predict noise, or take "
        "weighting min_snr or none",
    ),
)


def all_combinations() -> Iterator[Combination]:
    """Yield all combinations, allowed or not."""
    for values in product(*map(get_args, (Prediction, Loss, Weighting, Variance))):
        yield Combination(*values)


def broken_rule(combination: Combination) -> Rule | None:
    """Give the first rule that a combination breaks, None where it is allowed."""
    return next((rule for rule in RULES if rule.applies(combination)), None)


def check_combination(
    prediction: Prediction, loss: Loss, weighting: Weighting, variance: Variance
) -> None:
    """Refuse what does not go together.

    Raises:
        InputError: Names the two options, the reason and the remedy; or there is no such value.
    """
    combination = Combination(prediction, loss, weighting, variance)
    for name, kind in Combination.__annotations__.items():
        value = getattr(combination, name)
        if value not in get_args(kind):
            raise InputError(f"{name} must be one of {', '.join(get_args(kind))}; got {value!r}")
    rule = broken_rule(combination)
    if rule is not None:
        first, second = (f"--model.{name} {getattr(combination, name)}" for name in rule.options)
        raise InputError(f"{first} with {second}: {rule.reason}")


def combinations_table() -> str:
    """Lay out all combinations as text: yes, or the number of the reason why not."""
    predictions = get_args(Prediction)
    rows: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for loss, weighting, variance in product(*map(get_args, (Loss, Weighting, Variance))):
        rules = [broken_rule(Combination(p, loss, weighting, variance)) for p in predictions]
        cells = tuple("yes" if rule is None else str(RULES.index(rule) + 1) for rule in rules)
        rows.setdefault((loss, weighting, cells), []).append(variance)
    table = [["loss", "weighting", "variance", *predictions]]
    table += [
        [loss, weighting, ", ".join(variances), *cells]
        for (loss, weighting, cells), variances in rows.items()
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    reasons = [
        f"{number}. {' with '.join(rule.options)}: {rule.reason}"
        for number, rule in enumerate(RULES, start=1)
    ]
    note = "Schedule jsd and zero_terminal_snr go with the predictions x_0 and v alone."
    return "\n".join([*lines, "", *reasons, "", note])
