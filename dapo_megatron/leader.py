"""What only rank 0 has: prompts, engines, graders and the record of the run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict

from dapo_megatron.actor.layout import attention_tokens, read_hf_config
from dapo_megatron.actor.topology import Topology
from dapo_megatron.algo.filter import is_mixed
from dapo_megatron.algo.samples import to_samples
from dapo_megatron.config import Config
from dapo_megatron.data.stream import PromptStream
from dapo_megatron.data.tokenizer import decoder
from dapo_megatron.eval.evaluate import EvalResult, evaluate
from dapo_megatron.obs.metrics import step_metrics
from dapo_megatron.obs.observer import Observer
from dapo_megatron.obs.skipped import save_skipped
from dapo_megatron.pack import PackStats, pack
from dapo_megatron.preflight import Checked
from dapo_megatron.reward.judge import Judge
from dapo_megatron.rollout.collect import Rollout, collect
from dapo_megatron.rollout.engine import Sampling
from dapo_megatron.rollout.engines import Engines
from dapo_megatron.types import Group, StepResult, Update


class Leader:
    """Draws prompts, samples and grades responses, packs them for the ranks, and keeps the record.

    Engines start in the background while the ranks build the actor; call `wait_for_engines` before anything else.

    Args:
        checked: what `preflight` read: prompts and tokenizer.
    """

    def __init__(self, config: Config, topo: Topology, obs: Observer, checked: Checked) -> None:
        self.config, self.topo, self.obs = config, topo, obs
        self._started = time.monotonic()
        self._stop = checked.stop_token_ids
        self._prompts = PromptStream(checked.train, config.train.seed)
        self._held_out = checked.held_out
        self._evaluations: dict[str, EvalResult] = {}
        self._carried: Sequence[Group] = ()
        self._rollout: Rollout | None = None
        self._packing: PackStats | None = None
        model = config.model
        self._attention_tokens = attention_tokens(read_hf_config(model.path, trust_remote_code=model.trust_remote_code))
        with ExitStack() as stack:
            self.judge = stack.enter_context(closing(Judge(config.reward, config.rollout.max_response_tokens)))
            engines = Engines(config, config.run.folder, decoder(checked.tokenizer))
            self.engines = stack.enter_context(closing(engines))
            self._open = stack.pop_all()

    def wait_for_engines(self) -> None:
        with self.obs.phase("starting engines"):
            self.engines.wait_ready()

    def collect(self, step: int) -> list[list[Update]]:
        """Sample until there are enough groups to train on; returns the updates of every data-parallel rank."""
        config = self.config
        self._rollout = self.engines.run(
            collect(
                self.engines,
                self._prompts.take,
                self.judge,
                config.rollout,
                keep=is_mixed,
                sampling=Sampling.from_config(config.rollout, self._stop),
                carried=self._carried,
            )
        )
        self._carried = self._rollout.carried
        samples = to_samples(self._rollout.groups, config.algo, filter_truncated=config.reward.overlong.filter)
        ranks = pack(
            samples,
            mini_batch=config.train.mini_batch,
            micro_batch_tokens=config.train.micro_batch_tokens,
            data_parallel=self.topo.dp,
            seed=f"{config.train.seed}:{step}",
            sequence_multiple=config.parallel.sequence_multiple,
            total_multiple=config.parallel.total_multiple,
            micro_batch_multiple=config.parallel.micro_batch_multiple,
            attention_tokens=self._attention_tokens,
        )
        self._packing = PackStats.of(samples, ranks, self._attention_tokens)
        return ranks

    def log(self, step: int, policy: Mapping[str, float], results: Sequence[StepResult]) -> None:
        assert self._rollout and self._packing, "collect comes first"
        packing = {f"pack/{name}": value for name, value in asdict(self._packing).items()}
        metrics = step_metrics(self._rollout.stats, {**packing, **policy}, results)
        self.obs.step(step, metrics, self._rollout.groups)

    def keep_skipped(self, step: int, index: int, reason: str, ranks: Sequence[Update]) -> None:
        """Save the mini-batch of an update that was skipped, the share of every data-parallel rank, and say so."""
        try:
            path = save_skipped(self.config.run.folder, step, index, reason, ranks)
            where = f"its mini-batch is {path}" if path else "and not kept, for skipped/ holds enough of its kind"
        except OSError as error:  # the other ranks wait, and the file is only there to be looked at
            where = f"and could not be kept: {error}"
        self.obs.message(f"step {step}: {reason}; the update was skipped, {where}")

    def evaluate(self, when: str) -> None:
        """Measure accuracy on the held-out prompts, where the config has any."""
        if not self._held_out:
            return
        with self.obs.phase(f"evaluating ({when})"):
            result = self.engines.run(
                evaluate(
                    self.engines,
                    self._held_out,
                    self.judge,
                    self.config.eval,
                    max_tokens=self.config.rollout.max_response_tokens,
                    stop_token_ids=self._stop,
                )
            )
        self._evaluations[when] = result
        self.obs.evaluation(when, result)

    def summarise(self) -> None:
        """Write summary.json: the held-out accuracy and length before and after, where there is held-out data."""
        summary: dict[str, float | int | str] = {
            "seconds": round(time.monotonic() - self._started, 1),
            "seed": self.config.train.seed,
            "steps": self.config.train.steps,
        }
        for name, when in (("base", "before"), ("final", "after")):
            if result := self._evaluations.get(when):
                summary[f"{name}_accuracy"] = result.accuracy
                summary[f"{name}_length"] = result.mean_length
        self.obs.summary(summary)

    def close(self) -> None:
        """End engines and graders. Safe to call at any point, also after a failure."""
        self._open.close()
