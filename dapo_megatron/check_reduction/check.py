"""Runs the check as a whole: references first, then one layout after the other, and the verdict."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

from dapo_megatron.check_reduction.layouts import Layout, choose
from dapo_megatron.check_reduction.pool import RankError, RankPool
from dapo_megatron.check_reduction.report import Report
from dapo_megatron.config import Config
from dapo_megatron.errors import ConfigError

LIMITS = {"float32": 1e-5, "bfloat16": 6.0}
"""Largest error that passes. In float32 an error is the largest of a parameter's entries, relative to the largest
entry. bfloat16 keeps 8 bits of every number on the way, which says little by itself: there it is that of the
parameter's norm, in units of the same error of Hugging Face's model in bfloat16 (or of the median of these errors where
that is larger: a small parameter may have a small one by chance)."""
FINEST = 2.0**-8
"""The spacing of bfloat16's numbers: a smaller error is as good as none."""
TIMEOUT = 300.0
"""Seconds that one layout may take."""
DEFAULT_PROCESSES = 4


def check_reduction(
    config: Config,
    layouts: Sequence[str] | None = None,
    *,
    processes: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    verbose: bool = False,
    pool: RankPool | None = None,
) -> bool:
    """Compare gradients of every layout with the reference, print a table, and say whether all agree.

    Args:
        layouts: names of `layouts.STANDARD`, or "yours", the config's own; None for all of them.
        processes: the largest number of ranks; None for the number of GPUs, or 4 where there is none.
        dtype: that of the miniature; None for bfloat16 on GPUs, where Transformer Engine's packed attention has no
            float32 kernel, and float32 elsewhere.
        verbose: print every split instead of the worst of each layout.
        pool: runs the ranks; None for one that ends with the check.

    Raises:
        ConfigError: for a layout that is unknown or too large, or more processes than GPUs.
    """
    import torch

    if config.algo.found_loss.reference is None:
        raise ConfigError(
            f"algo.loss={config.algo.loss} brings no reference, and there is nothing to compare its gradient with; "
            f"give its Loss one (algo/losses/dapo.py shows how), or check another loss: the reduction is the same"
        )
    started = time.monotonic()
    gpus = torch.cuda.device_count()
    limit = processes or gpus or DEFAULT_PROCESSES
    if gpus and limit > gpus:
        raise ConfigError(f"--processes {limit}: each rank takes a GPU, and there are {gpus}; ask for at most {gpus}")
    own = Layout.own(config.parallel, config.launch.processes)
    fitted = own.fitted(limit)
    chosen = choose(layouts, fitted, limit)
    dtype = dtype or ("bfloat16" if gpus else "float32")
    report = Report(limit=LIMITS[dtype], verbose=verbose)
    with (
        TemporaryDirectory(prefix="dapo-megatron-check-") as folder,
        nullcontext(pool) if pool else closing(RankPool()) as ranks,
    ):
        source = _source(config, report)
        if layouts is None:
            chosen = [layout for layout in chosen if layout == fitted or _suits(source, layout)]
        fitting = [layout for layout in chosen if layout.ranks <= limit]
        if fitted in fitting and fitted != own:
            report.say(
                f"Your layout, {own.sizes} on {own.ranks} ranks, is checked as {fitted.sizes}: --processes is {limit}"
            )
        if config.train.logprob_tokens:
            report.say("train.logprob_tokens is left out: with larger passes the first ratio is 1 up to rounding only")
        report.start(dtype, gpus > 0, chosen, limit)
        for tied in (True, False):
            embeddings = "tied" if tied else "untied"
            jobs = _jobs(config, source, fitting, Path(folder) / embeddings, dtype, tied=tied)
            for layout in fitting:
                try:
                    found = ranks.run(layout.ranks, _check, jobs(layout), timeout=TIMEOUT)[0]
                    report.layout(layout, embeddings, found)
                except RankError as error:
                    report.failure(layout, embeddings, str(error))
    report.end(time.monotonic() - started)
    return report.passed


def _check(job: Any) -> Any:
    """Run on a rank: what it needs is imported there, not in the process that prints the table."""
    from dapo_megatron.check_reduction.rank import check

    return check(job)


def _source(config: Config, report: Report) -> Any:
    """Return the settings of the user's model, its config.json, which the miniature takes."""
    from transformers import AutoConfig
    from transformers.utils import logging

    from dapo_megatron.actor.architecture import SUPPORTED, check_trains
    from dapo_megatron.hf_folder import read_hf_config

    logging.disable_progress_bar()
    if config.model.path.exists():
        source = read_hf_config(config.model.path, trust_remote_code=config.model.trust_remote_code)
        check_trains(source, config.parallel)
        return source
    report.remark(
        f"model.path {config.model.path} is not there: the miniature has the settings of transformers' default "
        f"{SUPPORTED[0]} instead"
    )
    return AutoConfig.for_model(SUPPORTED[0])


def _suits(source: Any, layout: Layout) -> bool:
    """Return whether a model with experts, or without, can be trained in this layout at all."""
    from dapo_megatron.actor.architecture import number_of_experts

    experts, parallel = number_of_experts(source), layout.parallel
    return (parallel.tp == 1 or parallel.sequence_parallel) if experts else parallel.ep == 1


def _jobs(
    config: Config, source: Any, layouts: Sequence[Layout], folder: Path, dtype: str, *, tied: bool
) -> Callable[[Layout], Any]:
    """Write the model and the answers, and return what makes the job of a layout."""
    import torch

    from dapo_megatron.check_reduction import miniature
    from dapo_megatron.check_reduction.cases import make_cases
    from dapo_megatron.check_reduction.rank import Job
    from dapo_megatron.check_reduction.reference import Reference, errors

    model, answers = folder / "model", folder / "answers.pt"
    shared = source.num_key_value_heads < config.parallel.tp
    small = miniature.hf_config(source, layouts, tied=tied, shared_keys=shared)
    miniature.save_model(small, model, getattr(torch, dtype))
    own = miniature.run_config(config, layouts[0], model, dtype)
    reference = Reference(model, own)
    with torch.no_grad():
        cases = tuple(make_cases(own, reference.logprobs))
    updates, order = (1, 2), math.inf if dtype == "float32" else 2.0
    wanted = _answers(reference, cases, updates)
    units = {case: dict.fromkeys(values, 1.0) for case, values in wanted.items()}
    if dtype == "bfloat16":
        rounded = _answers(Reference(model, own, torch.bfloat16), cases, updates)
        units = {case: _floored(errors(rounded[case], values, order)) for case, values in wanted.items()}
    kept = {
        case: {name: (value, torch.tensor(units[case][name], dtype=torch.float64)) for name, value in values.items()}
        for case, values in wanted.items()
    }
    torch.save(kept, answers)
    return lambda layout: Job(miniature.run_config(config, layout, model, dtype), cases, answers, order, updates)


def _floored(noise: dict[str, float]) -> dict[str, float]:
    """Raise small errors to the units in which LIMITS counts."""
    floor = max(FINEST, median(noise.values()))
    return {name: max(error, floor) for name, error in noise.items()}


def _answers(reference: Any, cases: Sequence[Any], updates: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """Return case -> name -> loss or gradient, and under TWO_UPDATES parameters, which the reference keeps."""
    from dapo_megatron.check_reduction.rank import LOSS, TWO_UPDATES, beside_one

    wanted = {}
    for case in cases:
        answer = reference.answer(case)
        wanted[case.name] = {**answer.gradients, LOSS: beside_one(answer.loss)}
    wanted[TWO_UPDATES] = reference.two_updates(*(cases[index] for index in updates))
    return wanted
