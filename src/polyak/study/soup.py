"""`make_soup`: several fine-tunes of one model made into one, and what that is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.nn import Module

from polyak.checkpoints.merging.options import MergeOptions
from polyak.checkpoints.merging.prepare import Input, warn_of_stale
from polyak.files import as_path
from polyak.study.cooking import Cook
from polyak.study.evaluator import Judging, PathLike
from polyak.study.mixing import Mixing
from polyak.study.soup_found import Portion, Soup
from polyak.study.soup_plan import Planned, as_planned, planned, told_beside


def make_soup(  # noqa: PLR0913 - keyword-only arguments do not count
    inputs: Iterable[Input],
    output: PathLike,
    evaluate: Callable[..., Any] | None = None,
    *,
    method: str = "greedy",
    base: PathLike | None = None,
    model: Module | None = None,
    data: Iterable[Any] | None = None,
    minimize: bool = False,
    maximize: bool = False,
    holdout: float = 0.5,
    cache: PathLike | bool | None = None,
    timeout: float | None = None,
    name: str | None = None,
    key: str | None = None,
    dtype: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    shard_size: int | str = "5GB",
    max_memory: int | str = "128MiB",
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> Soup:
    r"""Make fine-tunes of one model into one: $\sum_i a_i x_i$ with $a_i \ge 0$ and $\sum_i a_i = 1$.

    - `"greedy"`: from the best ingredient on, in the order of their scores, each is added to the mean unless
      the score falls. Every ingredient is read twice: for its own score, and for the soup with it.
    - `"uniform"`: the mean of all.
    - `"learned"`: the coefficients that are best under a model of the loss between the ingredients, made from
      their scores and the distances between them (a Gram matrix), for 5 curvatures; the best mix evaluated.
    - `"model-stock"`: see `polyak.checkpoints.ModelStock`; needs `base`.

    Sums run in float32 at least, and the weights are streamed: what is evaluated is in float32, the output in the
    dtypes of the inputs. Integers, booleans and BatchNorm statistics are those of the last
    ingredient in the mix; greedy has the best one first.

    Args:
        inputs: Two checkpoints or more, as `average_checkpoints` takes them.
        output: A `.safetensors` file, a torch archive, or a folder.
        evaluate: As `Trajectory.search` takes it: a function of the model (or of the state dict without one),
            or a `polyak.study.Command`, which gets files of the form of `output`. Without it `"uniform"` and
            `"model-stock"` are made and not judged.
        method: `"greedy"`, `"uniform"`, `"learned"` or `"model-stock"`.
        base: The checkpoint that the fine-tunes began from, for `"model-stock"`.
        model: Whose weights are evaluated; it gets its own back.
        data: Training batches, to refresh the BatchNorm statistics of each soup.
        minimize: Lower scores are better.
        maximize: Higher scores are better.
        holdout: The share of the examples that does not choose, where there is one score per example.
        cache: The folder of known scores, or False; by default `.scores` beside the output.
        timeout: Seconds for one evaluation.
        name: What tells the evaluation from others, where that cannot be told from outside.
        key: Where the tensors are within the files.
        dtype: Of the floating tensors as written; by default that of the inputs.
        include: Name patterns: mix only these tensors.
        exclude: Name patterns: take these tensors from the last ingredient in the mix.
        shard_size: The size of a shard, where the output is a folder.
        max_memory: What all buffers together may take.
        threads: By default one per core, at most 16.
        overwrite: Replace the output if it exists.
        progress: Called after each evaluation with what was evaluated and its score.

    Raises:
        ArgumentError: fewer than two inputs, no evaluation where one is needed, an unknown method.
        MismatchError: tensors that do not line up, or do not fit the model.
        NonFiniteError: an ingredient whose score is no finite number, or whose weights are not finite.
        UsageError: the evaluation failed.
        OutputError: the output exists, or cannot be written. Whatever is raised, no output has appeared.

    A `UserWarning` says where the inputs share no basin.

    Source: Wortsman et al. 2022, arXiv 2203.05482.

    >>> import pathlib, tempfile, torch
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for n, value in enumerate([1.0, 2.0, 9.0]):
    ...     torch.save({"w": torch.tensor([value])}, folder / f"run-{n}.pt")
    >>> soup = make_soup(folder.glob("run-*.pt"), folder / "soup.pt", lambda w: abs(w["w"] - 1.6), minimize=True)
    >>> torch.load(folder / "soup.pt")["w"].item(), sorted(one.coefficient for one in soup.ingredients)
    (1.5, [0.0, 0.5, 0.5])

    """
    options = MergeOptions(
        dtype=dtype,
        include=include,
        exclude=exclude,
        base=base,
        key=key,
        shard_size=shard_size,
        max_memory=max_memory,
        threads=threads,
        overwrite=overwrite,
    )
    judging = Judging.of(locals())
    return run_soup(inputs, output, evaluate, options, judging, method=method, progress=progress)


def run_soup(  # noqa: PLR0913 - as above
    inputs: Iterable[Input],
    output: PathLike,
    evaluate: Callable[..., Any] | None,
    options: MergeOptions,
    judging: Judging,
    *,
    method: str,
    announce: Callable[[Planned], None] = lambda plan: None,
    progress: Callable[[str, float], None] | None = None,
) -> Soup:
    """As `make_soup`; `announce` is called with what is planned and was checked."""
    target = as_path(output)
    with planned(inputs, target, options, method, scored=evaluate is not None) as plan:
        announce(plan)
        mixing = Mixing(target, options, told_beside(plan, options, judging.data))
        if evaluate is None:
            return _unscored(plan, mixing)
        cook = Cook(plan, mixing, evaluate, judging, progress)
        with mixing.at_work(), cook.evaluator.at_work():
            return cook.soup()


def _unscored(plan: Planned, mixing: Mixing) -> Soup:
    warn_of_stale(plan.merge)
    mix = as_planned(plan)
    mixing.publish_unscored(mix, f"{plan.method} soup")
    portions = [
        Portion(one.path, mixing.share_of(one, mix), None, None) for one in plan.ingredients
    ]
    return Soup(
        output=plan.target,
        method=plan.method,
        ingredients=tuple(portions),
        score=None,
        held_out=None,
        comparison=None,
        minimize=False,
        examples=None,
        evaluations=0,
        cached=0,
        reads=mixing.reads,
        notes=tuple(mixing.notes()),
    )
