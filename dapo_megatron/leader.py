"""Holds what only rank 0 has: prompts, engines, graders and the record of the run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass

from dapo_megatron.actor.architecture import attention_tokens
from dapo_megatron.config import HELD_OUT, Config, HeldOut
from dapo_megatron.data.stream import PromptStream
from dapo_megatron.data.tokenizer import decoder
from dapo_megatron.errors import EngineError, RolloutError
from dapo_megatron.eval.evaluate import EvalResult, evaluate
from dapo_megatron.measures import Measures
from dapo_megatron.obs.metrics import step_metrics
from dapo_megatron.obs.observer import Observer
from dapo_megatron.pack import Packed, pack, packing
from dapo_megatron.preflight import Checked
from dapo_megatron.reward.judge import Judge
from dapo_megatron.rollout.collect import Rollout
from dapo_megatron.rollout.engine import Sampling
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.state import Kept, Stateful
from dapo_megatron.stop import Stop, StopRequested
from dapo_megatron.types import Group, TrainSample, UpdateResult

Evaluations = dict[str, dict[str, EvalResult]]


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step trains on, and how it came about."""

    rollout: Rollout
    packing: Measures
    packed: Packed
    """What every data-parallel replica trains on."""


class Leader:
    """Holds the parts that sample and grade responses, packs them for the ranks, and keeps the record.

    Engines start in the background, unless there seems to be nothing left to sample; then `wait_ready` starts them.

    Args:
        checked: what `preflight` read: prompts, tokenizer and the model's configuration.
    """

    def __init__(self, config: Config, obs: Observer, checked: Checked) -> None:
        self.config, self._obs = config, obs
        self._held_out = checked.held_out
        self._attention_tokens = attention_tokens(checked.hf_config)
        self.sampling = Sampling.from_config(config.rollout, checked.stop_token_ids)
        self.prompts = PromptStream(checked.train, config.train.seed)
        self.carried: Kept[tuple[Group, ...]] = Kept(tuple[Group, ...], ())
        """Mixed groups that the step before did not need."""
        self.evaluations: Kept[Evaluations] = Kept(Evaluations, {})
        """Set -> when ("before", "step 3", "after") -> result, so far."""
        self._decode = decoder(checked.tokenizer)
        with ExitStack() as stack:
            self._judges: dict[str, Judge] = {}
            """Rule -> who judges by it."""
            for rule in dict.fromkeys([config.reward.rule, *(its.rule for its in config.held_out.values())]):
                reward = config.reward.model_copy(update={"rule": rule})
                judge = Judge(reward, config.rollout.max_response_tokens, self._decode)
                self._judges[rule] = stack.enter_context(closing(judge))
            self.judge = self._judges[config.reward.rule]
            at_once = config.samples_after(checked.steps_done)
            engines = Engines(config, config.run.folder, at_once=at_once, nodes=checked.nodes)
            self.engines = stack.enter_context(closing(engines))
            self._open = stack.pop_all()
        obs.ask_what_is_waited_for(self.engines.waits)

    @property
    def state(self) -> dict[str, Stateful]:
        """The leader's parts that survive a restart, by name."""
        return {
            "prompts": self.prompts,
            "carried": self.carried,
            "evaluations": self.evaluations,
            "record": self._obs,
        }

    def pack(self, samples: Sequence[TrainSample], replicas: int, step: int) -> tuple[Packed, Measures]:
        """Decide which replica trains on which samples of a step, and in which micro-batches."""
        train, parallel = self.config.train, self.config.parallel
        packed = pack(
            samples,
            mini_batch=train.mini_batch,
            micro_batch_tokens=train.micro_batch_tokens,
            replicas=replicas,
            seed=f"{train.seed}:{step}",
            sequence_multiple=parallel.sequence_multiple,
            total_multiple=parallel.total_multiple,
            micro_batch_multiple=parallel.micro_batch_multiple,
            attention_tokens=self._attention_tokens,
        )
        return packed, packing(packed, self._attention_tokens)

    def log(self, step: int, batch: Batch, measures: Measures, results: Sequence[UpdateResult]) -> None:
        """Record a step: its batch, what was measured before its first update, and its updates."""
        engines = self.engines.take_measures()
        metrics = step_metrics({**batch.rollout.measures, **engines, **batch.packing, **measures}, results)
        self._obs.step(step, metrics, batch.rollout.groups)

    def evaluate_due(self, step: int, stop: Stop) -> None:
        """Evaluate on the sets that are due after `step` steps, where that was not done before a restart."""
        self._evaluate(f"step {step}" if step else "before", stop, lambda its: not step or its.due(step))

    def finish(self, stop: Stop) -> None:
        """Evaluate what all steps have made, and write summary.json; a run that is to stop before is not over."""
        self._evaluate("after", stop, lambda its: True)
        if stop.reason and any("after" not in self.evaluations.value.get(name, {}) for name in self.config.held_out):
            stop.saved = "saved after all steps; what is left is the last evaluation"
        else:
            self._summarise()

    def best(self, steps: Collection[int]) -> int | None:
        """Return which of the steps has the highest accuracy on the set of checkpoint.keep_best, the first of those
        that are alike; None where none of them was evaluated.
        """
        results = dict(self.evaluations.value.get(self.config.checkpoint.keep_best or "", {}))
        last = {"after": self.config.train.steps}
        accuracies = {
            last.get(when) or int(when.removeprefix("step ")): result.accuracy
            for when, result in results.items()
            if when != "before"
        }
        return max(sorted(accuracies.keys() & set(steps)), key=accuracies.__getitem__, default=None)

    def _evaluate(self, when: str, stop: Stop, due: Callable[[HeldOut], bool]) -> None:
        """Measure accuracy on the sets of held-out prompts that are due, unless the run is to stop."""
        for name, its in self.config.held_out.items():
            if not due(its) or when in self.evaluations.value.get(name, {}):
                continue
            result: EvalResult | None = None
            what = f"evaluating ({when})" if name == HELD_OUT else f"evaluating {name} ({when})"
            try:
                with suppress(StopRequested), stop.interruptible(), self._obs.phase(what):
                    result = self.engines.sample(
                        evaluate(
                            self.engines,
                            self._held_out[name],
                            self._judges[its.rule],
                            self._decode,
                            its,
                            seed=self.config.sampling_seed,
                            max_tokens=self.sampling.max_tokens,
                            stop_token_ids=self.sampling.stop_token_ids,
                        )
                    )
            except (EngineError, RolloutError) as error:  # as in a rollout: what is done can be saved
                stop.ask(f"error: {error}", error.exit_code)
            if result is None:
                return
            self.evaluations.value.setdefault(name, {})[when] = result
            self._obs.evaluation(when, its, result)

    def _summarise(self) -> None:
        """Write summary.json: the held-out accuracy and length before and after, of each set."""
        summary: dict[str, float | int | str] = {
            "seed": self.config.train.seed,
            "steps": self.config.train.steps,
        }
        for name, results in self.evaluations.value.items():
            prefix = "" if name == HELD_OUT else f"{name}/"
            for which, when in (("base", "before"), ("final", "after")):
                if result := results.get(when):
                    summary[f"{prefix}{which}_accuracy"] = result.accuracy
                    summary[f"{prefix}{which}_length"] = result.mean_length
        self._obs.summary(summary, self.evaluations.value)

    def close(self) -> None:
        """End engines and graders. Safe to call at any point, also after a failure."""
        self._open.close()
