"""What is saved by ranks in one layout is what ranks in another go on with."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from dapo_megatron.checkpoint import folder as folders
from dapo_megatron.errors import DapoError
from dapo_megatron.state import Kept, RunState
from tests.helpers.batches import make_micro_batch, make_mini_batch, ratio_loss
from tests.helpers.distributed import run_distributed
from tests.helpers.models import load_reference, make_config, save_qwen2
from tests.helpers.precise_adam import precise_adam

pytestmark = pytest.mark.multiproc

DP2, TP2, PP2 = {}, {"tp": 2}, {"pp": 2, "vpp": 2}
Act = Callable[[Any, Any, list[str]], object]
"""(checkpoints, update, messages) -> whatever a test looks at."""


def run(
    model: Path,
    folder: Path,
    parallel: dict[str, Any],
    dtype: str,
    act: Act,
    optimizer: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """On every rank: build an actor and its checkpoints, and `act`."""
    from dapo_megatron.actor import topology
    from dapo_megatron.actor.actor import Actor
    from dapo_megatron.checkpoint.checkpoints import Checkpoints
    from dapo_megatron.weights.hf import HfCheckpoint

    config = make_config(
        model,
        parallel=parallel,
        model={"dtype": dtype},
        checkpoint=settings,
        run={"dir": str(folder), "name": "run"},
        optimizer={"lr": 1e-2, **(optimizer or {})},
    )
    topo = topology.initialize(config.parallel)
    hf = HfCheckpoint(model)
    with precise_adam() if (optimizer or {}).get("precision_aware") else nullcontext():
        actor = Actor(config, topo, hf)
    lists: Kept[list[int]] = Kept(list[int], [])
    state = RunState({"lists": lists} if topo.is_leader else None)
    messages: list[str] = []
    checkpoints = Checkpoints(config, topo, actor, hf, state, tell=messages.append)

    def update(number: int) -> list[Any]:
        """Make an update whose data is the same in every layout. Returns loss, gradient norm and weights."""
        batches = [make_micro_batch([12, 8, 4], seed=10 * number + part, multiple=4) for part in range(2)]
        own = batches[topo.dp_rank :: topo.dp]
        (mini_batch,), _ = actor.with_old_logprobs([make_mini_batch(own, sum(b.loss_tokens for b in batches))])
        result = actor.update(mini_batch, ratio_loss, lr=1e-2)
        state.steps_done.value = number
        lists.value.append(number)
        weights = {name: tensor.clone() for name, tensor in hf.export(actor.chunks)}
        return [result["loss"], result["grad_norm"], weights]

    try:
        return act(checkpoints, update, messages), messages, (state.steps_done.value, lists.value)
    finally:
        checkpoints._wait()
        topology.shutdown()


def save_after_two(checkpoints: Any, update: Any, messages: list[str]) -> Any:
    update(1)
    checkpoints.save(1)
    update(2)
    checkpoints.save(2)
    following = update(3)  # while the second is being written
    checkpoints.finish()
    return following


def go_on(checkpoints: Any, update: Any, messages: list[str]) -> Any:
    assert checkpoints.restore() == 2
    return update(3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2(tmp_path_factory.mktemp("model"), tied=False, layers=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("saving", "loading"),
    [(DP2, DP2), (DP2, TP2), (TP2, PP2), (PP2, DP2), (PP2, PP2)],
    ids=["dp2", "dp2-tp2", "tp2-pp2", "pp2-dp2", "pp2"],
)
def test_another_layout_goes_on_to_rounding_and_the_same_bit_for_bit(
    tmp_path: Path, model: Path, saving: dict[str, Any], loading: dict[str, Any], dtype: str
) -> None:
    (before, *_), _ = (run_distributed(run, 2, model, tmp_path, saving, dtype, save_after_two)[0], None)
    after, messages, kept = run_distributed(run, 2, model, tmp_path, loading, dtype, go_on)[0]
    assert kept == (3, [1, 2, 3])
    assert messages == []
    if saving == loading:
        assert before[:2] == after[:2]
        assert all(torch.equal(before[2][name], after[2][name]) for name in before[2])
    else:
        exact = dtype == "float32"
        assert after[:2] == pytest.approx(before[:2], rel=1e-5 if exact else 2e-2, abs=1e-3)
        worst = max(float((before[2][name] - after[2][name]).abs().max()) for name in before[2])
        assert worst < (1e-5 if exact else 2e-2)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_precision_aware_optimizer_goes_on_bit_for_bit(tmp_path: Path, model: Path, moments: str) -> None:
    """With a stand-in for Transformer Engine's. What is kept in 16 bits is saved as it is, or in float32."""
    dtypes = {"exp_avg_dtype": moments, "exp_avg_sq_dtype": moments}
    precise = partial(run, optimizer={"precision_aware": True, "betas": [0.9, 0.95], **dtypes})
    (before, *_), *_ = run_distributed(precise, 2, model, tmp_path, DP2, "bfloat16", save_after_two)
    (after, *_), *_ = run_distributed(precise, 2, model, tmp_path, DP2, "bfloat16", go_on)
    assert before[:2] == after[:2]
    assert all(torch.equal(before[2][name], after[2][name]) for name in before[2])


def test_one_rank_goes_on_with_what_two_have_saved(tmp_path: Path, model: Path) -> None:
    (before, *_), *_ = run_distributed(run, 2, model, tmp_path, TP2, "float32", save_after_two)
    ((after, *_),) = run_distributed(run, 1, model, tmp_path, {}, "float32", go_on)
    assert after[:2] == pytest.approx(before[:2], rel=1e-5)


HARM: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a flipped byte": ("__1_0.distcp", lambda path: flip(path), "SHA-256 differs"),
    "a truncated file": ("__0_0.distcp", lambda path: os.truncate(path, 1000), "bytes; "),
    "a missing rank's file": ("__1_0.distcp", lambda path: path.unlink(), "is missing"),
    "no manifest": ("manifest.json", lambda path: path.unlink(), "manifest.json"),
    "state of another run": ("state.json", lambda path: path.write_text("{}"), "bytes; "),
    "a pickle that was swapped": (".metadata", lambda path: flip(path), "SHA-256 differs"),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def go_on_from_one(checkpoints: Any, update: Any, messages: list[str]) -> Any:
    return checkpoints.restore()


@pytest.fixture(scope="module")
def saved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_distributed(run, 2, model, folder, DP2, "float32", save_after_two)
    return folder


@pytest.mark.parametrize("harm", HARM)
def test_what_is_broken_is_named_and_the_one_before_is_taken(
    tmp_path: Path, model: Path, saved: Path, harm: str
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    name, breaks, said = HARM[harm]
    breaks(tmp_path / "run/checkpoints/step-2" / name)
    ranks = run_distributed(run, 2, model, tmp_path, DP2, "float32", go_on_from_one)
    assert [rank[0] for rank in ranks] == [1, 1]
    message, moved = ranks[0][1]
    assert "step-2 is broken" in message
    assert said in message
    assert name in message
    assert message.endswith("taking step-1")
    assert moved.startswith(f"{tmp_path / 'run/checkpoints/step-2.aside'}: the run goes on from an earlier step")


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_hostile_pickle_is_refused_also_where_the_manifest_vouches_for_it(
    tmp_path: Path, model: Path, saved: Path
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "run/checkpoints/step-2"
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "run.sh")))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][".metadata"] = asdict(folders.describe(folder / ".metadata"))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    ((step, (message, _), _),) = run_distributed(run, 1, model, tmp_path, {}, "float32", go_on_from_one)
    assert step == 1
    assert "step-2 is broken" in message and ".metadata" in message
    assert not (tmp_path / "run.sh").exists()


def test_where_all_are_broken_the_run_does_not_begin_anew(tmp_path: Path, model: Path, saved: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for step in (1, 2):
        (tmp_path / f"run/checkpoints/step-{step}/common.pt").unlink()
    with pytest.raises(DapoError, match="none of the 2 checkpoints"):
        run_distributed(run, 1, model, tmp_path, {}, "float32", go_on_from_one)


def full_disk(checkpoints: Any, update: Any, messages: list[str]) -> Any:
    """Rank 1 may write no file as large as its part, the second and the fourth time: torch's writer words it."""
    said = []
    for step in (1, 2, 3, 4):
        update(step)
        full, last = step % 2 == 0, step == 4
        limit = (1000 if full and checkpoints._ranks.rank == 1 else resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        try:
            checkpoints.save(step, last=last)
            checkpoints._wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if last:
            said.append(checkpoints.finish())
        checkpoints.news()
    return said


def test_a_full_disk_is_told_and_the_next_one_is_saved(tmp_path: Path, model: Path) -> None:
    ranks = run_distributed(partial(run, keep_last=5), 2, model, tmp_path, DP2, "float32", full_disk)
    good, bad, again = ranks[0][1]
    root = tmp_path / "run/checkpoints"

    def failed(step: int) -> str:
        free = r"\([\d,]+ bytes free, [\d,]+ to write\)"
        why = f"could not be written: rank 1: File too large: {re.escape(str(root))} {free}"
        return f"checkpoint of step {step} {why}; the last checkpoint is {re.escape(str(root))}/step-{step - 1}"

    assert good.startswith("checkpoint step-1: ")
    assert re.fullmatch(f"warning: {failed(2)}, and the next one is tried when it is due", bad), bad
    assert again.startswith("checkpoint step-3: ")
    for (end,), *_ in ranks:
        advice = "once that is mended, start the run again with run.existing=resume"
        assert re.fullmatch(f"{failed(4)}; {advice}", end), end
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-1", "step-3"]


def with_a_best(checkpoints: Any, update: Any, messages: list[str]) -> Any:
    """The first step is the best while it is alone, then the second."""
    checkpoints._settings = checkpoints._settings.model_copy(update={"keep_best": "aime"})
    checkpoints._best = lambda steps: min(steps, key=lambda step: abs(step - 2), default=None)
    pointed = []
    for step in (1, 2, 3, 4, 5):
        update(step)
        checkpoints.save(step)
        checkpoints._wait()
        pointed.append(checkpoints.point_to_best())
    checkpoints.finish()
    return pointed


def test_the_best_checkpoint_is_kept_besides_the_last(tmp_path: Path, model: Path) -> None:
    ranks = run_distributed(partial(run, keep_last=1), 1, model, tmp_path, {}, "float32", with_a_best)
    root = tmp_path / "run/checkpoints"
    assert ranks[0][0] == [1, 2, 2, 2, 2]
    assert sorted(path.name for path in root.iterdir()) == ["best", "latest", "step-2", "step-5"]
    assert (root / "best").read_text() == "step-2\n"


def cannot_read(checkpoints: Any, update: Any, messages: list[str]) -> Any:
    def stale(path: Path) -> Any:
        raise OSError(116, "Stale file handle")

    with patch.object(folders, "describe", stale):
        try:
            return checkpoints.restore()
        except DapoError as error:
            return str(error)


def test_a_machine_that_cannot_read_ends_the_run_rather_than_send_it_back(
    tmp_path: Path, model: Path, saved: Path
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    ranks = run_distributed(run, 2, model, tmp_path, DP2, "float32", cannot_read)
    for said, *_ in ranks:
        assert "rank 0 on " in said and "Stale file handle" in said and "does not go back" in said


def finish_fails(checkpoints: Any, update: Any, messages: list[str]) -> Any:
    from dapo_megatron.checkpoint import shards

    update(1)
    with patch.object(shards.Shards, "finish", side_effect=RuntimeError("Connection closed by peer")):
        checkpoints.save(1)
        first = checkpoints.finish()
    checkpoints.save(1)  # once more, although it is the same step
    return first, checkpoints.finish()


def does_not_see(checkpoints: Any, update: Any, messages: list[str], *, manifest: bool) -> Any:
    """Rank 1's file system lags behind: it has not got the manifest, or the files that it is to look at."""
    from dapo_megatron.checkpoint import agreement

    def missing(folder: Path, *rest: Any) -> Any:
        raise folders.MissingError(folder / (rest[0] if rest else folders.MANIFEST))

    name = "read_manifest" if manifest else "check_file"
    lags = patch.object(folders, name, missing) if checkpoints._ranks.rank else nullcontext()
    with lags, patch.object(agreement, "_LAG_SECONDS", 0.1):
        try:
            return checkpoints.restore()
        except DapoError as error:
            return str(error)


@pytest.mark.parametrize("manifest", [True, False])
def test_what_other_machines_see_is_not_missing(tmp_path: Path, model: Path, saved: Path, manifest: bool) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    look = partial(does_not_see, manifest=manifest)
    for said, *_ in run_distributed(run, 2, model, tmp_path, DP2, "float32", look):
        assert re.search(r"rank 1 on .* does not see .*, which other ranks do; the run does not go back", said)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["latest", "step-1", "step-2"]


def test_a_run_whose_checkpoints_are_not_to_be_seen_does_not_begin_anew(tmp_path: Path, model: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/latest").write_text("step-200\n")
    with pytest.raises(DapoError, match=r"says 'step-200', and there is no such checkpoint, nor any other.*rename"):
        run_distributed(run, 1, model, tmp_path, {}, "float32", go_on_from_one)


def hangs(checkpoints: Any, update: Any, messages: list[str]) -> Any:
    """Rank 1's writer hangs for 3 seconds."""
    from dapo_megatron.checkpoint import checkpoints as module

    def slow(*args: Any) -> Any:
        time.sleep(3)
        return write(*args)

    write = module.Shards.write
    with patch.object(module, "_REMIND_SECONDS", 0.5), ExitStack() as stack:
        if checkpoints._ranks.rank:
            stack.enter_context(patch.object(module.Shards, "write", slow))
        checkpoints.save(1)
        try:
            checkpoints._wait()
        except DapoError as error:
            messages.append(str(error))
        if checkpoints._thread:
            checkpoints._thread.join()


def test_the_rank_that_does_not_come_to_its_end_with_writing_is_named(tmp_path: Path, model: Path) -> None:
    ((_, messages, _), _) = run_distributed(partial(run, write_seconds=1.5), 2, model, tmp_path, DP2, "float32", hangs)
    (ended,) = [message for message in messages if "write_seconds" in message]
    assert re.match(r"the checkpoint of step 1 is still being written by rank 1 on \S+, after 2 s, checkpoint", ended)


def goes_on_with_other_betas(checkpoints: Any, update: Any, messages: list[str]) -> Any:
    assert checkpoints.restore() == 2
    update(3)
    return [(group["betas"], group["eps"]) for group in checkpoints._trained.optimizer.param_groups]


def test_other_settings_of_the_optimizer_count_from_there_on(tmp_path: Path, model: Path, saved: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    optimizer = {"lr": 1e-2, "betas": [0.8, 0.95], "eps": 1e-6}
    ((used, *_),) = run_distributed(
        partial(run, optimizer=optimizer), 1, model, tmp_path, {}, "float32", goes_on_with_other_betas
    )
    assert used and all(pair == ((0.8, 0.95), 1e-6) for pair in used)


def test_all_ranks_hear_of_a_save_that_failed_and_the_same_step_is_saved_again(tmp_path: Path, model: Path) -> None:
    for (first, second), *_ in run_distributed(run, 2, model, tmp_path, DP2, "float32", finish_fails):
        assert "checkpoint of step 1 could not be written" in first and "Connection closed" in first
        assert second is None
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-1\n"


def save_one(checkpoints: Any, update: Any, messages: list[str]) -> Any:
    trained = update(1)[2]
    checkpoints.save(1)
    assert checkpoints.finish() is None
    return trained


def test_the_policy_lies_beside_as_a_hugging_face_checkpoint_where_that_is_asked_for(
    tmp_path: Path, model: Path
) -> None:
    trained, messages, _ = run_distributed(partial(run, export_hf=True), 2, model, tmp_path, TP2, "float32", save_one)[
        0
    ]
    assert len(messages) == 1
    state = load_reference(tmp_path / "run/checkpoints/step-1/hf", torch.float32).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())


def no_room_beside(checkpoints: Any, update: Any, messages: list[str]) -> Any:
    from dapo_megatron.weights import hf

    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with patch.object(hf, "write_tensors", write):
        return save_one(checkpoints, update, messages)


def test_where_there_is_no_room_for_that_the_rest_is_saved(tmp_path: Path, model: Path) -> None:
    ranks = run_distributed(partial(run, export_hf=True), 2, model, tmp_path, TP2, "float32", no_room_beside)
    warning, saved = ranks[0][1]
    assert "no Hugging Face checkpoint beside it" in warning and "No space left" in warning
    assert saved.startswith("checkpoint step-1: ")
    assert not (tmp_path / "run/checkpoints/step-1/hf/model.safetensors").exists()
    assert (tmp_path / "run/checkpoints/step-1/hf/config.json").is_file()


def draws(checkpoints: Any, update: Any, messages: list[str]) -> Any:
    update(1)
    if not (restored := checkpoints.restore()):
        torch.manual_seed(7)
        checkpoints.save(1)
    import random

    import numpy as np

    drawn = [torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist()]
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker: Any = get_cuda_rng_tracker()
    with tracker.fork():
        drawn.append(torch.rand(3).tolist())
    return restored, drawn


def test_random_numbers_go_on_where_they_were(tmp_path: Path, model: Path) -> None:
    first = run_distributed(run, 2, model, tmp_path, TP2, "float32", draws)
    second = run_distributed(run, 2, model, tmp_path, TP2, "float32", draws)
    assert [rank[0][0] for rank in first] == [None, None]
    assert [rank[0][0] for rank in second] == [1, 1]
    assert [rank[0][1] for rank in first] == [rank[0][1] for rank in second]
    assert first[0][0][1][-1] != first[1][0][1][-1], "each tensor-parallel rank has a stream of its own"
