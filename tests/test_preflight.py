from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dapo_megatron import config_file
from dapo_megatron.config import HELD_OUT, Config
from dapo_megatron.data.stream import PromptStream
from dapo_megatron.errors import ConfigError
from dapo_megatron.obs.lock import hold
from dapo_megatron.obs.run_folder import open_run_folder
from dapo_megatron.preflight import Checked, preflight, preflight_eval, preflight_node
from dapo_megatron.rollout.node import introduce
from dapo_megatron.rollout.nodes import Nodes, with_share
from dapo_megatron.rollout.token import TOKEN, make_token
from tests.helpers.checkpoint import values, write_checkpoint, write_prompts
from tests.helpers.mail import mailboxes


def changed(folder: Path, **sections: dict[str, Any]) -> Config:
    given = values(folder)
    for name, section in sections.items():
        given[name] = {**given.get(name, {}), **section}
    return config_file.parse(given)


def refused(config: Config, world_size: int = 1, check: Callable[..., Checked] = preflight) -> str:
    with pytest.raises(ConfigError) as error:
        check(config, *([] if check is preflight_eval else [world_size]))
    return str(error.value)


def test_a_run_that_can_work(tmp_path: Path) -> None:
    checked = preflight(changed(tmp_path), 2)
    assert [prompt.text for prompt in checked.train] == ["1+2=", "2+2="]
    assert [(prompt.text, len(prompt.token_ids)) for prompt in checked.held_out[HELD_OUT]] == [("1+1=", 4)]
    assert (checked.stop_token_ids, checked.warnings) == ((0,), ())
    assert checked.train[0].token_ids == tuple(checked.tokenizer("1+2=")["input_ids"])
    assert not (tmp_path / "runs").exists()


def test_an_evaluation_needs_nothing_that_only_training_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dapo_megatron.preflight.find_spec", without("wandb", "megatron"))
    config = changed(tmp_path, parallel={"tp": 8}, run={"wandb_project": "x"})
    (tmp_path / "train.jsonl").unlink()
    config.run.folder.mkdir(parents=True)
    checked = preflight_eval(config)
    assert (list(checked.train), [prompt.text for prompt in checked.held_out[HELD_OUT]]) == ([], ["1+1="])


def test_several_held_out_sets_are_read_as_each_says(tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "2+2", "answer": 4}\n' * 2)
    sets = {
        "plain": {"data": str(write_prompts(tmp_path / "plain.jsonl", "1+1="))},
        "other": {"data": str(other), "prompt_field": "question", "template": "{problem}="},
    }
    config = changed(tmp_path, eval={"data": None, "sets": sets})
    for checked in (preflight(config, 1), preflight_eval(config)):
        texts = {name: [prompt.text for prompt in prompts] for name, prompts in checked.held_out.items()}
        assert texts == {"plain": ["1+1="], "other": ["2+2=", "2+2="]}
        (warning,) = checked.warnings
        assert "other.jsonl (set other) has 1 different problems in 2 rows" in warning


def test_rules_of_held_out_sets_need_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dapo_megatron.preflight.find_spec", without("math_verify"))
    assert preflight(changed(tmp_path / "a"), 1).train
    assert "math_verify is not installed" in refused(changed(tmp_path / "b", eval={"rule": "lenient"}))
    assert "math_verify is not installed" in refused(changed(tmp_path / "c"), check=preflight_eval)


def test_engines_that_run_already_need_a_token_and_nothing_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapo_megatron.preflight.find_spec", without("vllm"))
    engine = {"placement": "external", "urls": ["http://127.0.0.1:81"], "host": "203.0.113.1"}
    config = changed(tmp_path, engine=engine)
    monkeypatch.delenv(TOKEN, raising=False)
    assert "their token is not here" in refused(config)
    monkeypatch.setenv(TOKEN, make_token())
    checked = preflight(config, 1)
    assert checked.plan[-1] == "  engine 0: http://127.0.0.1:81" and not checked.warnings
    assert "an evaluation sends no weights" in refused(config, check=preflight_eval)


def test_engines_of_two_kinds_have_to_meet_the_limits_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, make_token())
    urls = ["http://127.0.0.1:81", "http://127.0.0.1:82"]
    both = {"placement": "external", "urls": urls, "kinds": ["vllm", "sglang"]}
    assert preflight(changed(tmp_path, engine=both), 1).plan[-1] == "  engine 1: http://127.0.0.1:82, sglang"
    shutil.rmtree(tmp_path / "model")
    said = refused(changed(tmp_path, engine=both, rollout={"top_p": 0.9}))
    assert_matches(r"rollout.top_p\(0.9\): with engine.kind=sglang", said)
    shutil.rmtree(tmp_path / "model")
    preflight(changed(tmp_path, engine={**both, "kinds": ["vllm", "vllm"]}, rollout={"top_p": 0.9}), 1)


def test_a_leader_whose_machine_has_no_engines_needs_nothing_of_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    given = changed(tmp_path, engine={"nodes": [1], "count": 2})
    first, other = mailboxes(2)
    introduce(other, 0)
    answer = {"ranks": 1, "address": "203.0.113.7", "ports": [81, 82], "gpus": [["0"], ["1"]]}
    other.post(0, answer)
    monkeypatch.setattr("dapo_megatron.rollout.place.address_for", lambda hosts: {"203.0.113.1"})
    nodes = Nodes(first, given, 2, seconds=1)
    with monkeypatch.context() as patch:
        patch.setattr("dapo_megatron.preflight.find_spec", without("vllm"))
        checked = preflight(given, 2, 2, nodes)
        with pytest.raises(ConfigError, match="vllm is not installed"):
            preflight_node(with_share(given, 2), 0)
    assert checked.nodes is nodes
    assert checked.plan[0].endswith("on 1 of 2 nodes, beside the GPUs of their ranks; weights by gloo from 203.0.113.1")
    (warning,) = checked.warnings
    assert warning.startswith("engine.nodes: engines listen at 203.0.113.7: engines answer only")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    with pytest.raises(ConfigError, match=r"ranks\(2\) \+ engine.count\(2\) .* = 4 GPUs, but 3 are visible"):
        preflight_node(with_share(given, 2), 2)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"eval": {"data": None}}, "eval.data is null"),
        ({"eval": {"data": "nowhere.jsonl"}}, "nowhere.jsonl: there is no such file"),
        ({"eval": {"temperature": 0.0, "samples": 4}}, r"eval, set held-out: samples\(4\) at temperature=0"),
        ({"model": {"path": "nowhere"}}, "model.path nowhere is not a folder"),
        ({"engine": {"tensor_parallel": 3}}, r"engine.tensor_parallel\(3\)"),
        ({"data": {"max_prompt_tokens": 3}}, r"1 of 1 prompts .*heldout.jsonl are longer"),
    ],
)
def test_evaluations_that_cannot_work(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    assert_matches(message, refused(changed(tmp_path, **sections), check=preflight_eval))


@pytest.mark.parametrize(
    ("check", "gpus", "message"),
    [
        (lambda config: preflight(config, 2), 0, None),
        (lambda config: preflight(config, 2), 6, None),
        (lambda config: preflight(config, 4, local_ranks=2), 6, None),
        (
            lambda config: preflight(config, 2),
            5,
            r"ranks\(2\) \+ engine.count\(2\) x engine.tensor_parallel\(2\) = 6 GPUs, but 5 are visible",
        ),
        (lambda config: preflight(config, 4), 6, r"ranks\(4\) \+ .* = 8 GPUs, but 6 are visible"),
        (preflight_eval, 4, None),
        (preflight_eval, 3, r"ranks\(0\) \+ .* = 4 GPUs, but 3 are visible"),
    ],
)
def test_ranks_and_engines_have_gpus_of_their_own_where_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[[Config], Checked], gpus: int, message: str | None
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    config = changed(tmp_path, engine={"count": 2, "tensor_parallel": 2})
    if message is None:
        check(config)
        return
    with pytest.raises(ConfigError) as error:
        check(config)
    assert_matches(message, str(error.value))


@pytest.mark.parametrize(
    ("ranks", "engine", "gpus", "message"),
    [
        (1, {}, 0, None),
        (1, {}, 1, r"= 2 GPUs, but 1 are visible .*, or .* with engine.placement=colocated"),
        (1, {"placement": "colocated"}, 1, None),
        (1, {"placement": "colocated"}, 0, None),
        (2, {"placement": "colocated"}, 1, r"2 ranks on this machine need a GPU each, but 1 are visible"),
        (2, {"placement": "colocated", "count": 3}, 4, r"count\(3\) x engine.tensor_parallel\(1\) = 3 GPUs, .* are 2;"),
    ],
)
def test_engines_on_the_gpus_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, engine: dict[str, Any], gpus: int, message: str | None
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    config = changed(tmp_path, engine=engine)
    if message is None:
        preflight(config, ranks)
    else:
        assert_matches(message, refused(config, ranks))


def test_an_evaluation_has_the_gpus_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    two, three = (changed(tmp_path / str(count), engine={"placement": "colocated", "count": count}) for count in (2, 3))
    preflight_eval(two)
    message = refused(three, check=preflight_eval)
    assert_matches(r"ranks\(0\) \+ .* = 3 GPUs, but 2 are visible", message)
    assert "engine.placement=colocated" not in message, "no rank has a GPU to share"


@pytest.mark.parametrize(("host", "exposed"), [("127.0.0.1", 0), ("localhost", 0), ("0.0.0.0", 1)])
def test_engines_that_others_can_reach_are_warned_of(tmp_path: Path, host: str, exposed: int) -> None:
    config = changed(tmp_path, engine={"host": host})
    for warnings in (preflight(config, 1).warnings, preflight_eval(config).warnings):
        assert len(warnings) == exposed
        assert all(f"engine.host={host}: engines answer only those who have" in warning for warning in warnings)


def test_a_precision_aware_step_wants_transformer_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("dapo_megatron.preflight._installed", lambda package: package != "transformer_engine")
    sections = {"optimizer": {"precision_aware": True}, "model": {"dtype": "bfloat16", "layers": "torch"}}
    message = refused(changed(tmp_path, **sections), 1)
    assert message.startswith("transformer_engine is not installed, but this run needs it: see requirements/gpu.txt")


def test_a_reference_that_is_not_there_to_be_offloaded_is_warned_of(tmp_path: Path) -> None:
    (warning,) = preflight(changed(tmp_path, memory={"offload_reference": True}), 1).warnings
    assert warning == "memory.offload_reference is set, but algo.kl.coef is 0: there is no reference model"


@pytest.mark.parametrize(
    ("own", "generation", "stops", "named"),
    [
        (None, None, [], None),
        (0, [0], [], None),
        (0, [0, 5], [], "generation_config.json of the model name [5] as end tokens, and only [0] end a response"),
        ([0, 4], [5, 4], [], "config.json and generation_config.json of the model name [4, 5] as end tokens"),
        ([0, 4], [5, 4], [4], "generation_config.json of the model name [5] as end tokens, and only [0, 4] end"),
        ([0, 4], [5, 4], [4, 5], None),
    ],
)
def test_end_tokens_of_the_model_that_end_nothing_are_warned_of(
    tmp_path: Path, own: Any, generation: Any, stops: list[int], named: str | None
) -> None:
    config = changed(tmp_path, rollout={"stop_token_ids": stops})
    file = config.model.path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": own}))
    (config.model.path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    told = preflight(config, 1).warnings
    assert len(told) == (named is not None)
    assert named is None or f"model.path: {named}" in told[0]
    assert stops != [4] or told[0].endswith("set rollout.stop_token_ids=[4, 5]")


def test_settings_of_a_loss_that_is_not_chosen_are_warned_of(tmp_path: Path) -> None:
    config = changed(tmp_path, algo={"loss": "gspo", "dapo": {"clip_high": 0.3}})
    assert preflight(config, 1).warnings == ("algo.dapo is set, but algo.loss is gspo: its settings do nothing",)


def test_a_place_where_nothing_can_be_written_is_refused(tmp_path: Path) -> None:
    assert_matches("cannot write to /proc for the folder /proc/x", refused(changed(tmp_path, run={"dir": "/proc/x"})))


def test_a_disk_without_room_for_the_policy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("dapo_megatron.preflight.shutil.disk_usage", lambda path: usage)
    assert_matches(f"{tmp_path} has 1.0 kB free, and the trained policy takes 6.4 kB in ", refused(config))


@pytest.mark.parametrize(
    ("model", "checkpoint", "there", "count", "each"),
    [
        ({}, {}, 0, 3, 16),
        ({"dtype": "bfloat16"}, {}, 0, 3, 14),
        ({}, {"keep_last": 1}, 0, 2, 16),
        ({}, {"every": 0}, 0, 1, 16),
        ({}, {"every": 25}, 0, 2, 16),
        ({}, {}, 1, 2, 16),
        ({}, {}, 5, 1, 16),
    ],
)
def test_a_disk_without_room_for_the_checkpoints_is_warned_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: dict[str, Any],
    checkpoint: dict[str, Any],
    there: int,
    count: int,
    each: int,
) -> None:
    config = changed(tmp_path, model=model, checkpoint=checkpoint, train={"steps": 30}, run={"save_hf": False})
    found = dict.fromkeys(range(there), tmp_path)
    monkeypatch.setattr("dapo_megatron.preflight.checkpoints.complete_steps", lambda root: found)
    needed = count * each * POLICY
    for free in (needed, needed - 1):
        usage = shutil.disk_usage("/")._replace(free=free)
        monkeypatch.setattr("dapo_megatron.preflight.shutil.disk_usage", lambda path, usage=usage: usage)
        warnings = preflight(config, 1).warnings
        assert len(warnings) == (free < needed)
    (warning,) = warnings
    assert f"of 1,600 numbers take {count} x {each} x that = {needed / 1000:.1f} kB. Where none can be" in warning


def test_a_folder_for_weights_has_to_have_room_for_two_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shared"
    config = changed(tmp_path, weights={"transport": "disk", "folder": str(folder)}, run={"save_hf": False})
    preflight(config, world_size=1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("dapo_megatron.preflight.shutil.disk_usage", lambda path: usage)
    assert_matches(f"weights.folder: {tmp_path} has 1.0 kB free, and two versions of the weights take", refused(config))
    folder.touch()
    assert_matches(f"weights.folder: {folder}/.* cannot be written: {folder} is no folder", refused(config))


POLICY = 50 * 32
"""Numbers of the checkpoint that `values` makes, in float32."""


def refused_for_room(config: Config, free: int, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What `preflight` says where so many bytes are free on each disk."""
    usage = shutil.disk_usage("/")._replace(free=free)
    with monkeypatch.context() as patch:
        patch.setattr("dapo_megatron.preflight.shutil.disk_usage", lambda path: usage)
        try:
            preflight(config, 1)
        except ConfigError as error:
            return str(error)
    return None


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_room_is_counted_in_the_dtype_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, item: int
) -> None:
    folder = tmp_path / "shared"
    sections: dict[str, Any] = {"model": {"dtype": dtype}, "weights": {"transport": "disk", "folder": str(folder)}}
    config = changed(tmp_path, **sections)
    assert refused_for_room(config, 2 * item * POLICY, monkeypatch) is None
    one = f"{item * POLICY / 1000:.1f} kB"
    assert_matches(
        f"two versions of the weights take 2 x {one} = {2 * item * POLICY / 1000:.1f} kB in {dtype}; free some",
        str(refused_for_room(config, 2 * item * POLICY - 1, monkeypatch)),
    )
    assert_matches(
        f"the trained policy takes {one} in {dtype}", str(refused_for_room(config, item * POLICY - 1, monkeypatch))
    )


def test_versions_that_are_there_make_room_when_they_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(tmp_path, weights={"transport": "disk", "folder": str(tmp_path)}, run={"save_hf": False})
    for name, nbytes in {"version-3": 1000, "version-4": 8000, ".version-4.2.unfinished": 500}.items():
        (config.weights_folder / name).mkdir(parents=True)
        (config.weights_folder / name / "model.safetensors").write_bytes(bytes(nbytes))
    # The newest stays beside the first that is written: 8,000 + 6,400 bytes, of which 9,500 are free or become so.
    assert refused_for_room(config, 4900, monkeypatch) is None
    assert_matches(
        r"has 4.9 kB free, 9.5 kB more in versions that are there already, and two versions of the weights take "
        r"8.0 kB \(the newest there\) \+ 6.4 kB = 14.4 kB in float32",
        str(refused_for_room(config, 4899, monkeypatch)),
    )


def test_a_folder_for_weights_that_another_run_holds_is_refused(tmp_path: Path) -> None:
    config = changed(tmp_path, weights={"transport": "disk", "folder": str(tmp_path / "shared")})
    with closing(hold(config.weights_folder, "weights.folder", print)):
        message = f"the folder {config.weights_folder} is in use by process {os.getpid()} on "
        assert_matches(message, refused(config))
    preflight(config, 1)


def test_versions_of_the_weights_do_not_go_where_the_model_is(tmp_path: Path) -> None:
    given = values(tmp_path)
    inside = tmp_path / "shared" / given["run"]["name"]
    inside.mkdir(parents=True)
    Path(given["model"]["path"]).rename(inside / "version-3")
    given["model"]["path"] = str(inside / "version-3")
    config = config_file.parse(given | {"weights": {"transport": "disk", "folder": str(tmp_path / "shared")}})
    assert_matches(f"weights.folder: versions are written to {inside}, and old ones removed, but ", refused(config))


def test_versions_of_the_weights_do_not_go_into_the_folder_of_the_run(tmp_path: Path) -> None:
    """The run holds its lock, and would wait for itself."""
    given = values(tmp_path)
    config = config_file.parse(given | {"weights": {"transport": "disk", "folder": given["run"]["dir"]}})
    assert_matches("weights.folder=.*: versions are written to its folder .*, which is the run's own", refused(config))


def test_it_imports_no_heavy_library(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(config_file.dump(changed(tmp_path)))
    code = (
        "import sys; from pathlib import Path; from dapo_megatron import config_file, preflight\n"
        "preflight.preflight(config_file.load(Path(sys.argv[1])), 1)\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('megatron', 'vllm', 'mbridge')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "config.yaml")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("sections", "world_size", "message"),
    [
        (
            {"parallel": {"pp": 2}, "memory": {"recompute": "full", "recompute_layers": 2}},
            2,
            r"memory.recompute_layers\(2\): each model chunk has 2 / \(pp\(2\) x vpp\(1\)\) = 1 layers",
        ),
        ({"parallel": {"tp": 2, "pp": 2}}, 6, r"tp\(2\) x pp\(2\) x cp\(1\) = 4 does not divide world size 6"),
        ({"parallel": {"tp": 8}}, 8, r"tp\(8\) does not divide the model's num_attention_heads\(4\)"),
        ({"parallel": {"pp": 3}}, 3, r"pp\(3\) does not divide the model's num_hidden_layers\(2\)"),
        ({"engine": {"tensor_parallel": 3}}, 1, r"engine.tensor_parallel\(3\) .* num_attention_heads\(4\)"),
        (
            {"rollout": {"max_response_tokens": 60}, "train": {"micro_batch_tokens": 68}},
            1,
            r"\(8\) \+ .*\(60\) = 68 is more than the model's max_position_embeddings\(64\)",
        ),
        ({"data": {"max_prompt_tokens": 3}}, 1, r"2 of 2 prompts .* longer than data.max_prompt_tokens\(3\)"),
        ({"eval": {"temperature": 0.0, "samples": 4}}, 1, r"eval, set held-out: samples\(4\) at temperature=0"),
        ({"engine": {"port": 65_535, "count": 2}}, 1, r"65535\) \+ engine.count\(2\) - 1 = 65536"),
        ({"engine": {"nodes": [0, 1], "count": 2}}, 2, r"engine\.nodes names 1, but this run has node 0 alone"),
        ({"run": {"wandb_project": "x"}}, 1, r"wandb is not installed, .*\[wandb\].*run.wandb_project=null"),
        ({"rollout": {"stop_token_ids": [99]}}, 1, r"\[99\] are not among the tokenizer's \d+ tokens"),
        ({"model": {"layers": "transformer_engine"}}, 1, r"transformer_engine is not installed, .* model.layers=torch"),
        (
            {"optimizer": {"precision_aware": True}, "model": {"dtype": "bfloat16"}},
            1,
            r"precision_aware is a step of Transformer Engine on GPUs, and torch sees none; set .*=false",
        ),
        ({"reward": {"format": "r1"}}, 1, r"looks for <think> .* no response could keep the format"),
    ],
)
def test_settings_that_cannot_work(
    tmp_path: Path, sections: dict[str, Any], world_size: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapo_megatron.preflight.find_spec", without("wandb"))
    config = changed(tmp_path, **{name: dict(section) for name, section in sections.items()})
    assert_matches(message, refused(config, world_size))


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


def without(*missing: str) -> Callable[[str], Any]:
    from importlib.util import find_spec

    return lambda name: None if name in missing else find_spec(name)


def test_an_engine_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dapo_megatron.preflight.find_spec", without("vllm"))
    assert refused(changed(tmp_path)).startswith(
        "vllm is not installed, but this run needs it: pip install -e '.[cpu]'"
    )


def test_an_engine_with_a_python_of_its_own(tmp_path: Path) -> None:
    preflight(changed(tmp_path, engine={"python": sys.executable}), 1)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"kind": "vlm"}, "engine.kind: 'vlm' is not known; known are sglang, vllm, or"),
        ({"python": "nowhere/python"}, "engine.python=nowhere/python does not run Python: .*No such file"),
        ({"python": "/bin/false"}, "engine.python=/bin/false does not run Python: .* exit status 1"),
        ({"python": "bare"}, "vllm is not installed for engine.python=.*bare: pip install"),
    ],
)
def test_an_engine_that_cannot_be_started(tmp_path: Path, engine: dict[str, str], message: str) -> None:
    if engine.get("python") == "bare":
        engine = {"python": str(tmp_path / "bare")}
        Path(engine["python"]).write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
        Path(engine["python"]).chmod(0o755)
    assert_matches(message, refused(changed(tmp_path, engine=engine)))


@pytest.mark.parametrize("rule", ["lenient", "math_verify"])
def test_a_grading_rule_whose_package_is_not_installed(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapo_megatron.preflight.find_spec", without("math_verify"))
    assert_matches("math_verify is not installed.*reward.rule=dapo", refused(changed(tmp_path, reward={"rule": rule})))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: (model / "config.json").unlink(), "has no config.json"),
        (lambda model: (model / "model.safetensors").unlink(), r"has no \*.safetensors"),
        (lambda model: (model / "config.json").write_text("{"), "cannot read .*config.json"),
        (lambda model: [path.unlink() for path in model.glob("tokenizer*")], "no tokenizer in"),
        (lambda model: (model / "tokenizer.json").write_text("{}"), "cannot load the tokenizer"),
        (lambda model: [path.unlink() for path in model.iterdir()] and model.rmdir(), "is not a folder"),
    ],
)
def test_a_checkpoint_that_is_not_whole(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    config = changed(tmp_path)
    damage(tmp_path / "model")
    assert_matches(message, refused(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "architecture 'gemma' is not supported"),
        ({"vocab_size": 4}, r"train.jsonl:1 holds token 12, but the model has a vocabulary of 4"),
        ({"end_token": False}, "no end token"),
    ],
)
def test_other_checkpoints(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    model = write_checkpoint(tmp_path / "other", **changes)
    assert_matches(message, refused(changed(tmp_path, model={"path": str(model)})))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "train.jsonl holds no rows"),
        ('{"prompt": "1+2=", "answer": "3"}\n{"prompt": \n', "train.jsonl:2 is not JSON"),
        ('{"question": "1+2=", "answer": "3"}\n', "train.jsonl:1: no field 'prompt'"),
    ],
)
def test_data_that_cannot_be_read(tmp_path: Path, content: str, message: str) -> None:
    config = changed(tmp_path)
    (tmp_path / "train.jsonl").write_text(content)
    assert_matches(message, refused(config))


def test_held_out_data_is_read_too(tmp_path: Path) -> None:
    config = changed(tmp_path)
    (tmp_path / "heldout.jsonl").unlink()
    assert_matches("heldout.jsonl: there is no such file", refused(config))


def test_dropped_prompts_are_left_to_the_caller_to_announce(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = changed(tmp_path, data={"max_prompt_tokens": 5, "long_prompts": "drop"})
    write_prompts(tmp_path / "train.jsonl", "1+2=", "1+2+3=")
    checked = preflight(config, 1)
    assert len(checked.train) == 1
    (warning,) = checked.warnings
    assert_matches("1 of 2 prompts .*train.jsonl are longer .*; they are left out", warning)
    assert not caplog.records


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert_matches(f"cannot listen on 127.0.0.1:{port}", refused(changed(tmp_path, engine={"port": port})))


def test_an_address_of_another_machine(tmp_path: Path) -> None:
    given = values(tmp_path / "other")
    for host in ("192.0.2.1", "[::1]", "http://127.0.0.1", "a..b"):
        config = config_file.parse({**given, "engine": {"host": host}})
        assert_matches(re.escape(f"engine.host={host} is no address or name of this machine"), refused(config))


def test_a_run_folder_that_is_there(tmp_path: Path) -> None:
    config = changed(tmp_path)
    config.run.folder.mkdir(parents=True)
    assert "run.existing=rename" in refused(config)
    for existing in ("rename", "resume"):
        preflight(changed(tmp_path / existing, run={"dir": str(tmp_path / "runs"), "existing": existing}), 1)


def test_other_prompts_than_those_of_the_run_that_goes_on(tmp_path: Path) -> None:
    given = changed(tmp_path, run={"existing": "resume"})
    state = PromptStream(preflight(given, 1).train, given.train.seed).state_dict()
    open_run_folder(given).close()
    folder = given.run.folder / "checkpoints/step-3"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(
        json.dumps({"leader": {"prompts": state}, "shared": {"steps_done": {"value": 3}}})
    )
    assert preflight(given, 1).steps_done == 3
    write_prompts(tmp_path / "train.jsonl", "1+2=", "3+2=")
    assert "data.train=" in refused(given)
    assert "other file names, tokens or answers than those that the run had so far" in refused(given)
