"""The only door to Optuna: which settings are tried next, and below which loss a trial is worth its end."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from dlrscale.search.space import Range

SPARED = 1  # evaluations by which no trial is pruned: the longest warm-up ends with the first


class Sampler:
    """Asks Optuna for one trial after the other. Equal seeds and equal answers give equal trials.

    Tree-structured Parzen estimators (Bergstra et al., NeurIPS 2011) after some random trials; the first trial is the
    given settings. Pruning is Optuna's median rule: a trial ends where its best loss so far is above the median, over
    the trials that came to their end, of the loss at the same evaluation. All of those have ended when a trial starts,
    so the limits are known before it (`limits`) and the trial needs nobody to ask.
    """

    def __init__(self, ranges: Sequence[Range], seed: int, trials: int, start: dict[str, float]):
        """Prepare a search.

        Args:
            ranges: What is tuned.
            seed: Of the sampler.
            trials: How many trials there will be; they decide how many are random, and from which on one is pruned.
            start: The first trial; what it leaves out is drawn.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.ranges = ranges
        self.random, self.unpruned = settings(trials)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.random)
        self.study = optuna.create_study(sampler=sampler, direction="minimize")
        self.study.enqueue_trial(start)
        self.trial: Any = None
        self.ended: list[list[float]] = []  # losses at the evaluations of trials that came to their end

    def ask(self) -> dict[str, float]:
        """The settings of the next trial."""
        trial = self.trial = self.study.ask()
        found = {}
        for r in self.ranges:
            if r.choices:
                found[r.name] = trial.suggest_categorical(r.name, r.choices)
            elif r.whole:
                found[r.name] = trial.suggest_int(r.name, int(r.low), int(r.high), log=r.log)
            else:
                found[r.name] = trial.suggest_float(r.name, r.low, r.high, log=r.log)
        return found

    def limits(self) -> list[float | None]:
        """For each evaluation of the next trial, the loss above which it ends; None where it does not."""
        if len(self.ended) < self.unpruned:
            return []
        longest = max(map(len, self.ended))
        found = [median(losses[n] for losses in self.ended if len(losses) > n) for n in range(longest)]
        return [None if n < SPARED else limit for n, limit in enumerate(found)]

    def tell(self, losses: Sequence[float], loss: float | None) -> None:
        """Say how the trial ended that was asked for last.

        Args:
            losses: Its held-out loss at each evaluation.
            loss: The one at its end; None where it did not get there. Optuna counts such a trial as worse than all
                that did, and one that got nowhere as the worst.
        """
        import optuna

        for n, value in enumerate(losses):
            self.trial.report(value, n)
        if loss is None:
            self.study.tell(self.trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self.study.tell(self.trial, loss)
            self.ended.append(list(losses))


def settings(trials: int) -> tuple[int, int]:
    """How many of so many trials are random, and how many must have ended before one is pruned."""
    return min(10, max(3, trials // 3)), min(5, max(2, trials // 4))
