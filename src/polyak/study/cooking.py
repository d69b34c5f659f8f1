"""How a soup is chosen by scores: each method, and the comparison with the best ingredient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from polyak.batchnorm.update_file import update_bn_file
from polyak.checkpoints.merging.measure import Inputs
from polyak.checkpoints.merging.prepare import warn_of_stale
from polyak.errors import NonFiniteError, require
from polyak.study.bootstrap import paired_bootstrap
from polyak.study.coefficients import best_mix, curvature_of, squared_distances
from polyak.study.evaluator import Evaluator, Judging, Subject
from polyak.study.filling import check_shapes, has_statistics
from polyak.study.found import Comparison
from polyak.study.mixing import Ingredient, Mix, Mixing, mean_of, weights_in
from polyak.study.scores import FOLDER
from polyak.study.soup_found import Portion, Soup
from polyak.study.soup_plan import TRIED, Planned, as_planned
from polyak.study.windows import search_values

_CURVATURES = tuple(2.0**power for power in range(-4, 5))


class Cook:
    """Makes one soup that is judged; the planned one is checked already."""

    def __init__(
        self,
        planned: Planned,
        mixing: Mixing,
        evaluate: Callable[..., Any],
        judging: Judging,
        progress: Callable[[str, float], None] | None,
    ) -> None:
        self.planned, self.mixing = planned, mixing
        self._judging, self._progress = judging, progress
        self._score_with: dict[str, float] = {}
        self._notes: list[str] = []
        newest = planned.merge.inputs[-1]
        if judging.model is not None:
            shapes = {n: list(newest.tensors[n].shape) for n in weights_in(newest)}
            check_shapes(judging.model, shapes, f"{newest.path} is not a checkpoint of this model")
        target = planned.target
        require(
            not (self._judging.refreshes and not target.suffix),
            f"output is {target}, a folder, and BatchNorm statistics are set in files. Name a .safetensors "
            "file or a torch archive.",
        )
        self.evaluator = Evaluator(
            evaluate,
            judging,
            folder=target.absolute().parent / FOLDER,
            question="soup",
            stale="the last ingredient" if has_statistics(newest.tensors) else None,
        )

    def soup(self) -> Soup:
        """Judge, choose, write, compare."""
        self.own = {one.path: self._own_score(one) for one in self.planned.ingredients}
        self.ranked = sorted(
            self.planned.ingredients, key=lambda one: self._loss(self.own[one.path])
        )
        mix = {"greedy": self._greedy, "learned": self._learned}.get(
            self.planned.method, self._fixed
        )()
        if len(mix.ingredients) > 1 and self._judging.refreshes:
            update_bn_file(self.mixing.made(mix), self._judging.model, self._judging.data)  # type: ignore[arg-type]
        elif len(mix.ingredients) > 1:
            warn_of_stale(self.planned.merge)
        self.mixing.publish(mix, f"{self.planned.method} soup")
        return self._found(mix, self.ranked[0])

    def _fixed(self) -> Mix:
        mix = as_planned(self.planned)
        what = f"the {self.planned.method} soup"
        score = self._score(mix, what)
        if not math.isfinite(score):
            raise NonFiniteError(
                f"The score of {what} is {score}; expected a finite number. Nothing was written."
            )
        return mix

    def _greedy(self) -> Mix:
        chosen = [self.ranked[0]]
        least = self._loss(self.own[chosen[0].path])
        for one in self.ranked[1:]:
            trial = mean_of([*chosen, one], "grown")
            score = self._score_with[one.path] = self._score(trial, f"the soup with {one.path}")
            if (loss := self._loss(score)) <= least:
                chosen, least = [*chosen, one], loss
            self.mixing.keep(mean_of(chosen, "grown"))
        return mean_of(chosen, "grown")

    def _learned(self) -> Mix:
        losses = [self._loss(self.own[one.path]) for one in self.planned.ingredients]
        distances = self._distances()
        known = {mean_of(self.ranked[:1]): min(losses)}

        def value(mix: Mix, what: str) -> float:
            if len(mix.ingredients) == 1:
                return self._loss(self.own[mix.ingredients[0].path])
            known[mix] = self._loss(self._score(mix, what))
            self.mixing.keep(min(known, key=known.__getitem__))
            return known[mix]

        mean = mean_of(self.planned.ingredients)
        loss = value(mean, "the uniform soup")
        curvature = curvature_of(losses, distances, mean.coefficients, loss)

        def by_curvature(times: float) -> float:
            mix = self._mix(best_mix(losses, distances, times * curvature))
            return value(mix, f"the soup for {times:g} times the curvature")

        if curvature > 0:
            search_values(by_curvature, _CURVATURES, TRIED)
        else:
            self._notes.append(
                "The uniform soup is no better than its ingredients on average: there is nothing to learn from."
            )
        return min(known, key=known.__getitem__)

    def _distances(self) -> Any:
        merge, count = self.planned.merge, len(self.planned.ingredients)
        inputs = Inputs(
            merge.alignment.tensors, (1.0,) * count, has_base=True, threads=merge.threads
        )
        self.mixing.count(self.planned.ingredients)
        return squared_distances(inputs)

    def _mix(self, coefficients: Sequence[float]) -> Mix:
        """Of those that count."""
        pairs = [
            pair for pair in zip(self.planned.ingredients, coefficients, strict=True) if pair[1]
        ]
        return Mix(tuple(one for one, _ in pairs), tuple(c for _, c in pairs))

    def _score(self, mix: Mix, what: str) -> float:
        return self._scored(self.mixing.subject(mix, what))

    def _own_score(self, one: Ingredient) -> float:
        score = self._scored(self.mixing.single(one))
        if not math.isfinite(score):
            raise NonFiniteError(
                f"The score of {one.path} is {score}; expected a finite number. Leave this ingredient out, or mend "
                "the evaluation. Nothing was written."
            )
        return score

    def _scored(self, subject: Subject) -> float:
        evaluator = self.evaluator
        score = float(evaluator.split(evaluator.scores(subject))[0].mean())
        if self._progress is not None:
            self._progress(subject.what, score)
        return score

    def _loss(self, score: float) -> float:
        return self.evaluator.loss(score)

    def _found(self, mix: Mix, best: Ingredient) -> Soup:
        """What was made, against the best ingredient on the examples that chose neither."""
        if len(mix.ingredients) == 1:
            self._notes.append(f"No other ingredient helped: the output is {best.path} as it is.")
            subject = self.mixing.single(mix.ingredients[0])
        else:
            subject = self.mixing.subject(mix, "the soup")
        mine, theirs = (
            self.evaluator.scores(subject),
            self.evaluator.scores(self.mixing.single(best)),
        )
        comparison = None
        if len(mix.ingredients) > 1:
            comparison = self._comparison(mine, theirs)
        return self._result(mix, mine, comparison)

    def _comparison(self, mine: Tensor, theirs: Tensor) -> Comparison:
        what, against = "the soup", "the best ingredient"
        (chose, held), (chose_theirs, held_theirs) = map(self.evaluator.split, (mine, theirs))
        if held is None or held_theirs is None:
            self._notes.append(self.evaluator.why_no_interval("soup"))
            return Comparison(what, against, float(chose - chose_theirs), None, None)
        return Comparison(what, against, *paired_bootstrap(held, held_theirs))

    def _result(self, mix: Mix, scores: Tensor, comparison: Comparison | None) -> Soup:
        score, held = self._means(scores)
        evaluator = self.evaluator
        return Soup(
            output=self.planned.target,
            method=self.planned.method,
            ingredients=tuple(self._portion(one, mix) for one in self.ranked),
            score=score,
            held_out=held,
            comparison=comparison,
            minimize=evaluator.minimize,
            examples=evaluator.examples,
            evaluations=evaluator.evaluations,
            cached=evaluator.cached,
            reads=self.mixing.reads,
            notes=(*self.mixing.notes(), *self._notes, *dict.fromkeys(evaluator.notes)),
        )

    def _portion(self, one: Ingredient, mix: Mix) -> Portion:
        own, held = self._means(self.evaluator.scores(self.mixing.single(one)))
        return Portion(
            one.path, self.mixing.share_of(one, mix), own, held, self._score_with.get(one.path)
        )

    def _means(self, scores: Tensor) -> tuple[float, float | None]:
        """On the examples that choose, and on those that are held out."""
        choosing, held = self.evaluator.split(scores)
        return float(choosing.mean()), None if held is None else float(held.mean())
