from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from dapo_megatron import config_file
from dapo_megatron.config import HELD_OUT, Config, EvalSetConfig
from dapo_megatron.config.algo import loss_sections
from dapo_megatron.errors import ConfigError

MINIMAL = "model: {path: some/model}\ndata: {train: train.jsonl}\n"


def load(folder: Path, text: str = MINIMAL, *overrides: str) -> Config:
    path = folder / "config.yaml"
    path.write_text(text)
    return config_file.load(path, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.respones=8"], "unknown key rollout.respones; did you mean rollout.responses?"),
        (["algo.clip_hihg=0.3"], "unknown key algo.clip_hihg; did you mean algo.dapo.clip_high?"),
        (["reward.overlong.cach=8"], "unknown key reward.overlong.cach; did you mean reward.overlong.cache?"),
        (["modle.path=x"], "unknown key modle; did you mean model?"),
        (
            ["train.learning_rate=1"],
            "unknown key train.learning_rate; train knows logprob_tokens, max_skipped_updates, micro_batch_tokens",
        ),
        (["algo.mini_batch=4"], "unknown key algo.mini_batch; did you mean train.mini_batch?"),
        (["train.steps=ten"], "train.steps = 'ten': input should be a valid integer"),
        (["train.steps=1.5"], "train.steps = 1.5: input should be a valid integer"),
        (["rollout.responses=1"], "rollout.responses = 1: input should be greater than or equal to 2"),
        (
            ["rollout.dynamic_sampling=false", "rollout.generation_batch=64", "rollout.surplus_groups=carry"],
            "rollout: generation_batch=64, surplus_groups='carry' would do nothing: with dynamic_sampling=false",
        ),
        (["rollout.dynamic_sampling=false", "rollout.max_generation_batches=3"], "max_generation_batches=3 would do"),
        (["rollout.dynamic_sampling=false", "rollout.too_few_groups=train"], "too_few_groups='train' would do"),
        (["rollout.temperature=0"], "rollout.temperature = 0: input should be greater than 0"),
        (["rollout.temperature=0.001"], "rollout.temperature: 0.001 is between 0 and 0.01"),
        (["eval.temperature=1e-6"], "eval.temperature: 1e-06 is between 0 and 0.01"),
        (["engine.request_seconds=5"], "unknown key engine.request_seconds; engine knows batch_invariant, count, "),
        (["engine.placement=external"], "placement=external is for engines that run already; give their urls"),
        (
            ["engine.sleep=true"],
            "sleep=true with placement=split: engines on GPUs of their own have no memory that the actor could use",
        ),
        (
            ["engine.sleep=true", "engine.placement=external", "engine.urls=[http://a:1]"],
            "sleep=true with placement=external: engines started elsewhere have no memory",
        ),
        (["engine.urls=[http://a:1]"], "urls say where engines run already, but placement is split"),
        (["engine.placement=external", "engine.urls=[http://a:1]", "engine.count=2"], "count(2), but 1 urls"),
        (["engine.placement=external", "engine.urls=[http://a:1]", "engine.nodes=all"], "nodes(all) say where a run"),
        (["engine.nodes=[]"], "names each node that has engines once, at least one; got []"),
        (["engine.nodes=[1,0,1]"], "names each node that has engines once, at least one; got [1, 0, 1]"),
        (
            ["engine.nodes=[-1]"],
            "from 0, such as [0,1], or all; got [-1]",
        ),
        (["engine.nodes=1"], "engine.nodes: is a list of the numbers of nodes, from 0, such as [0,1], or all; got 1"),
        (["engine.nodes=[a]"], "or all; got ['a']"),
        (["engine.placement=external", "engine.urls=[http://a:1,http://a:1/]"], "http://a:1 more than once"),
        (["engine.placement=external", "engine.urls=[http://A:1,http://a:01]"], "http://a:1 more than once"),
        (["engine.placement=external", "engine.urls=['http://[FE80::1]:1','http://[fe80::1]:1']"], "more than once"),
        (
            ["engine.placement=external", "engine.urls=[http://a:1]", "engine.kinds=[vllm,sglang]"],
            "kinds(2) are for urls(1), one for each",
        ),
        (["engine.count=2", "engine.kinds=[vllm,sglang]"], "engines that the run starts are all of one kind"),
        *(
            (["engine.placement=external", f"engine.urls=['{url}']"], f"'{url}' is not of the form http://HOST:PORT")
            for url in (
                "a:1",
                "https://a:1",
                "http://a",
                "http://a:99999",
                "http://a:1/v1",
                "http://me@a:1",
                "http://:1",
            )
        ),
        (["optimizer.lr=.nan"], "optimizer.lr = nan: input should be a finite number"),
        (["reward.rule=exact"], "reward.rule = 'exact': input should be 'dapo', 'lenient' or 'math_verify'"),
        (["run.name=../elsewhere"], "run.name = '../elsewhere': string should match pattern"),
        (
            ["rollout.prompts=3", "rollout.responses=4", "train.mini_batch=8"],
            "train.mini_batch(8) does not divide rollout.prompts(3) x rollout.responses(4) = 12",
        ),
        (
            ["reward.overlong.cache=30000"],
            "reward.overlong.cache(30000) is more than rollout.max_response_tokens(20480)",
        ),
        (
            ["train.micro_batch_tokens=2048"],
            "(20480) = 22528 tokens, fills 22527; raise train.micro_batch_tokens to 22527 or more",
        ),
        (["parallel.sequence_parallel=true"], "parallel: sequence_parallel splits between tensor-parallel ranks"),
        (["memory.recompute_layers=2"], "memory: recompute_layers is for recompute=full, but recompute is none"),
        (
            ["memory.offload=[optimizer,gradients,optimizer]"],
            "memory: offload names the same twice: optimizer, gradients",
        ),
        (["memory.recompute_modules=[core_attn]"], "memory: recompute_modules is for recompute=selective"),
        (["memory.recompute=selective", "memory.recompute_modules=[]"], "memory: recompute=selective recomputes"),
        (["parallel.vpp=2"], "parallel: vpp(2) splits pipeline stages into chunks, but pp is 1"),
        (["algo.correction.band=[2.0, 0.5]"], "algo.correction: band must rise: 2.0 is not below 0.5"),
        (["algo.correction.band=[1]"], "algo.correction.band: value 2 of the list is missing"),
        (["algo.correction.band=0.5,5"], "algo.correction.band = '0.5,5': write a list, such as [0.5,5]"),
        (["algo.kl=0.1"], "algo.kl = 0.1: algo.kl is a section, with the keys coef, estimator"),
        (["parallel.xp=2"], "unknown key parallel.xp; parallel knows cp"),
        (["parallel.dp=2"], "unknown key parallel.dp; data parallel is what is left: ranks / (tp x pp x cp)"),
        (["train.steps=true"], "train.steps: true is for switches, and this is none"),
        (["algo.kl.estimator=k1"], "algo.kl.estimator = 'k1': input should be 'k2' or 'k3'"),
        (["optimizer.lr=20", "optimizer.weight_decay=0.1"], "optimizer: lr(20) x weight_decay(0.1) = 2"),
        (["optimizer.exp_avg_dtype=bfloat16"], "exp_avg_dtype=bfloat16 is for precision_aware=true, and it is off"),
        (
            ["optimizer.precision_aware=true", "optimizer.exp_avg_sq_dtype=bfloat16"],
            "a step without gradient takes 1 - 0.999 = 0.001 off the second moment",
        ),
        (
            ["optimizer.precision_aware=true", "parallel.distributed_optimizer=false"],
            "optimizer.precision_aware needs parallel.distributed_optimizer",
        ),
        (["optimizer.precision_aware=true", "model.dtype=float32"], "but model.dtype is float32; leave it off"),
        (["parallel.overlap_param_gather=true"], "overlap_param_gather needs overlap_grad_reduce, which is off"),
        (["train.logprob_tokens=32000"], "train.logprob_tokens(32000) is less than train.micro_batch_tokens(32768)"),
        (
            ["train.logprob_tokens=65536", "parallel.ep=2"],
            "with parallel.ep(2) ranks must have as many as those that they share out experts with",
        ),
        (
            ["train.logprob_tokens=65536", "parallel.pp=2", "parallel.vpp=2"],
            "with parallel.vpp(2) they must stay a multiple of pp(2)",
        ),
        (["data.template=Solve this."], "data.template: must hold {problem}"),
        (["reward.right=-1"], "reward: right (-1.0) must be more than wrong (-1.0)"),
        (["launch.heartbeat_port=0"], "launch.heartbeat_port = 0: input should be greater than or equal to 1"),
        (["launch.heartbeat_port=65536"], "launch.heartbeat_port = 65536: input should be less than or equal to 65535"),
        (["train.steps"], "override 'train.steps' is not of the form section.key=value"),
        (["model.path.x=1"], "override 'model.path.x=1': path is a value, not a section"),
        (["train.steps=[1"], "override 'train.steps=[1' is not YAML"),
        (
            ["data.template={problem}"],
            "data.template = {'problem': None}: braces or a colon make a mapping; put quotes",
        ),
        (["run.dir=a: b"], "run.dir = {'a': 'b'}: braces or a colon make a mapping; put quotes around the text"),
        (
            ["run.name=2024_10"],
            "run.name = 202410: YAML reads this as int; put quotes around the text: 'run.name=\"...\"'",
        ),
        (["run.name=2024-10-01"], "run.name = datetime.date(2024, 10, 1): YAML reads this as date; put quotes around"),
        (
            ["run.dir=runs #2"],
            "YAML takes '#2' for a comment; leave it out, or put quotes around the whole value: 'run.dir",
        ),
        (["run.dir=# 2"], "YAML takes '# 2' for a comment"),
    ],
)
def test_values_that_cannot_work(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, MINIMAL, *overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {train: x.jsonl}", "model is missing, and it has no default"),
        ("model: {}\ndata: {train: x.jsonl}", "model.path is missing, and it has no default"),
        ("model: [", "config.yaml is not YAML"),
        ("model: {path: x}\nmodel: {dtype: float32}", "'model' is there twice"),
        ("model: {path: x, path: y}", "'path' is there twice"),
        (
            "model: {path: x}\n5: x",
            "config.yaml, line 2, column 1: 5 is no key: YAML reads it as int, and keys",
        ),
        ("model: {path: x, on: y}", "config.yaml, line 1, column 18: on is no key: YAML reads it as bool"),
        ("? [a, b]\n: x", "config.yaml, line 1, column 3: ['a', 'b'] is no key: YAML reads it as list"),
        ("", "config.yaml is empty"),
        ("- model", "expected sections such as model: and data:, got list"),
        ("model: {path: !!python/object:os.system x}", "config.yaml is not YAML"),
    ],
)
def test_files_that_cannot_work(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert message in str(error.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config nowhere\.yaml: No such file"):
        config_file.load(Path("nowhere.yaml"))


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)rollout\.respones.*train\.steps"):
        load(tmp_path, MINIMAL, "train.steps=x", "rollout.respones=8")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/李")
    config = load(tmp_path, MINIMAL, "model.path=~/m", "data.train=~/*.jsonl", "eval.data=~/h.jsonl", "run.dir=~/runs")
    assert (config.model.path, config.run.dir) == (Path("/home/李/m"), Path("/home/李/runs"))
    assert (config.data.train, config.eval.data) == ("/home/李/*.jsonl", "/home/李/h.jsonl")
    assert "/home/李/m" in config_file.dump(config)
    with pytest.raises(ConfigError, match=r"run\.dir: ~nobody-here/runs: "):
        load(tmp_path, MINIMAL, "run.dir=~nobody-here/runs")


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL, "optimizer.lr=3e-7", "algo.dapo.dual_clip=10", "optimizer.betas=[0.9,0.95]")
    assert load(tmp_path, config_file.dump(config)) == config
    config = load(tmp_path, MINIMAL, "rollout.dynamic_sampling=false")
    assert load(tmp_path, config_file.dump(config)) == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=1e-6", 1e-6),
        ("optimizer.lr=2.5E-5", 2.5e-5),
        ("train.steps=0", 0),
        ("eval.data=null", None),
        ("eval.data=held out.jsonl", "held out.jsonl"),
        ("engine.extra_args=[--a, b]", ["--a", "b"]),
        ("data.template='Q: {problem}\nA: x=1'", "Q: {problem} A: x=1"),
        ("model.path=a=b", Path("a=b")),
    ],
)
def test_overrides_are_yaml(tmp_path: Path, override: str, expected: object) -> None:
    section, name = override.split("=")[0].split(".")
    assert getattr(getattr(load(tmp_path, MINIMAL, override), section), name) == expected


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gbk.yaml").write_bytes("# 中文\n".encode("gbk"))
    with pytest.raises(ConfigError, match="write it in UTF-8"):
        config_file.load(tmp_path / "gbk.yaml")


@pytest.mark.parametrize(
    ("algo", "message"),
    [
        ({"loss": "dpo"}, "'dpo' is not known; known are cispo, dapo, gspo, or some.module:NAME"),
        ({"loss": "json:dumps"}, "expected a dapo_megatron.algo.loss.Loss"),
        ({"loss": "./mine.py:x"}, "cannot be loaded: TypeError"),
        ({"loss": "dapo", "gspo": {"clip_low": 3}}, "algo.gspo.clip_low = 3: input should be less than 1"),
        (
            {"loss": "gspo", "gspo": {"clip_hihg": 3}},
            "unknown key algo.gspo.clip_hihg; did you mean algo.gspo.clip_high",
        ),
        ({"clip_low": 0.2}, "unknown key algo.clip_low; did you mean algo.dapo.clip_low"),
        ({"loss_scope": "constant"}, "a constant scope needs a length"),
        ({"scope_length": 8}, "no other scope has one"),
    ],
)
def test_losses_that_cannot_be(algo: dict[str, Any], message: str) -> None:
    values = {"model": {"path": "m"}, "data": {"train": "t"}, "algo": algo}
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_file.parse(values)


def test_later_overrides_win(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL + "train: {steps: 3}", "train.steps=4", "train.steps=5").train.steps == 5


def test_defaults_are_the_published_run(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.algo.loss, config.algo.loss_scope, config.algo.kl.coef) == ("dapo", "token", 0.0)
    assert (config.algo.settings.clip_low, config.algo.settings.clip_high) == (0.2, 0.28)
    assert (config.rollout.batch_size, config.train.mini_batch) == (512 * 16, 512)
    assert (config.rollout.max_response_tokens, config.reward.overlong.cache) == (20_480, 4096)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-6, 0.1)


def test_the_schema_explains_keys_and_refuses_others() -> None:
    schema = config_file.schema()
    algo = schema["$defs"]["AlgoConfig"]
    assert algo["additionalProperties"] is False
    assert "clip-higher" in algo["properties"]["dapo"]["properties"]["clip_high"]["description"]
    assert schema["anyOf"] == [{"required": ["base"]}, {"required": ["model", "data"]}]
    assert set(schema["properties"]) == {"base", *Config.model_fields} and schema["additionalProperties"] is False


def test_a_file_says_what_it_has_different_from_its_base(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases/first.yaml").write_text(MINIMAL + "eval: {data: held.jsonl}\nreward: {overlong: {cache: 8}}\n")
    (tmp_path / "bases/second.yaml").write_text("base: first.yaml\nrollout: {stop_token_ids: [1, 2], top_p: 0.5}\n")
    text = "base: bases/second.yaml\nrollout: {stop_token_ids: [3]}\nreward: {overlong: {weight: 2}}\nrun: {name: x}\n"
    config = load(tmp_path, text, "rollout.top_p=0.7")
    assert (str(config.model.path), config.eval.data, config.run.name) == ("some/model", "held.jsonl", "x")
    assert (config.rollout.stop_token_ids, config.rollout.top_p) == ([3], 0.7)
    assert (config.reward.overlong.cache, config.reward.overlong.weight) == (8, 2.0)
    assert config_file.parse(config.model_dump(mode="json")) == config, "what a run keeps needs no base"


def test_null_takes_away_what_the_base_has(tmp_path: Path) -> None:
    sets = "eval: {sets: {one: {data: a}, other: {data: b}}}\nreward: {overlong: {cache: 8}}\n"
    (tmp_path / "base.yaml").write_text(MINIMAL + sets)
    config = load(tmp_path, "base: base.yaml\neval: {sets: {one: null, mine: {data: c}}}\nreward: null\n")
    assert list(config.eval.sets) == ["other", "mine"]
    assert config.reward == type(config.reward)()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: 3", "config.yaml: base = 3; give the name of a file, relative to"),
        ("base: nowhere.yaml", "{folder}/nowhere.yaml of {folder}/config.yaml: No such file"),
        ("base: ../{folder}/config.yaml", "base leads back to where it began: "),
        ("base: over.yaml", "unknown key modle; did you mean model?"),
    ],
)
def test_bases_that_cannot_work(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "over.yaml").write_text(MINIMAL + "modle: {path: x}\n")
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text.format(folder=tmp_path.name))
    assert message.format(folder=tmp_path) in str(error.value)


@pytest.mark.parametrize(("world", "copies"), [(4, 1), (8, 2), (12, 3)])
def test_data_parallel(tmp_path: Path, world: int, copies: int) -> None:
    assert load(tmp_path, MINIMAL, "parallel.tp=2", "parallel.pp=2").parallel.data_parallel(world) == copies


def test_layout_that_does_not_divide(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tp\(4\) x pp\(2\) x cp\(1\) = 8 does not divide world size 12"):
        load(tmp_path, MINIMAL, "parallel.tp=4", "parallel.pp=2").parallel.data_parallel(12)


def test_the_quick_start_is_valid() -> None:
    for path in sorted(Path(__file__).parents[1].glob("configs/*.yaml")):
        config_file.load(path)


@pytest.mark.parametrize(("every", "steps"), [(0, []), (2, [2, 4])])
def test_evaluation_is_due(tmp_path: Path, every: int, steps: list[int]) -> None:
    its = load(tmp_path, MINIMAL, "eval.data=x.jsonl", f"eval.every={every}").held_out[HELD_OUT]
    assert [step for step in range(1, 6) if its.due(step)] == steps


def test_sets_have_what_the_section_has_unless_they_say_otherwise(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL).held_out == {}
    section = ["eval.samples=32", "eval.top_p=0.7", "eval.every=5", "data.template='{problem}?'"]
    one = load(tmp_path, MINIMAL, *section, "eval.data=x.jsonl", "reward.rule=lenient").held_out
    assert list(one) == [HELD_OUT]
    its = one[HELD_OUT]
    assert (its.source, its.samples, its.top_p, its.temperature, its.rule) == ("x.jsonl", 32, 0.7, 1.0, "lenient")
    assert (its.data.template, its.metrics) == ("{problem}?", "eval/")

    sets = (
        "eval.sets={a: {data: a.jsonl}, b: {data: b.jsonl, every: 0, temperature: 0, samples: 1, answer_field: gold}}"
    )
    a, b = load(tmp_path, MINIMAL, *section, sets, "eval.rule=math_verify", "eval.sets.b.rule=dapo").held_out.values()
    assert (a.name, a.metrics, a.every, a.samples, a.rule) == ("a", "eval/a/", 5, 32, "math_verify")
    assert (b.every, b.samples, b.temperature, b.top_p, b.rule) == (0, 1, 0.0, 0.7, "dapo")
    assert (b.data.answer_field, b.data.prompt_field, a.data.answer_field) == ("gold", "prompt", "answer")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.data=x", "eval.sets={a: {data: a}}"], "eval: data is one set, and sets are several (a)"),
        (["eval.sets={held-out: {data: a}}"], "eval: sets.held-out: this is what the set of data is called"),
        (["eval.sets={a.differ: {data: a}}"], "eval: sets.a.differ: a.differ.jsonl is the file of what rules"),
        (["eval.sets={a b: {data: a}}"], "eval.sets.a b: a set's name is that of files: A-Z,"),
        (["eval.sets={a: {}}"], "eval.sets.a.data is missing"),
        (["eval.sets={a: {data: a, sample: 3}}"], "unknown key eval.sets.a.sample; did you mean eval.sets.a.samples?"),
        (["eval.sets={a: {data: a, template: x}}"], "eval.sets.a.template: must hold {problem}"),
        (["eval.sets={a/b: {data: a}}"], "eval.sets.a/b"),
    ],
)
def test_sets_that_cannot_be(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, MINIMAL, *overrides)
    assert message in str(error.value)


def test_every_key_says_what_it_means() -> None:
    sections = [*(info.annotation for info in Config.model_fields.values()), *loss_sections().values(), EvalSetConfig]
    silent = [
        f"{section.__name__}.{name}"
        for section in sections
        if isinstance(section, type) and issubclass(section, BaseModel)
        for name, info in section.model_fields.items()
        if not info.description
    ]
    assert not silent


def test_the_budget_of_a_micro_batch_counts_the_padding_of_the_layout(tmp_path: Path) -> None:
    sizes = ["data.max_prompt_tokens=200", "rollout.max_response_tokens=800", "reward.overlong.cache=100"]
    layout = ["parallel.cp=2", "parallel.tp=4", "parallel.sequence_parallel=true"]
    load(tmp_path, MINIMAL, *sizes, "train.micro_batch_tokens=1000")
    load(tmp_path, MINIMAL, *sizes, *layout, "train.micro_batch_tokens=1008")
    with pytest.raises(ConfigError, match=r"holds 992 slots in multiples of 16; .* = 1000 tokens, fills 1000"):
        load(tmp_path, MINIMAL, *sizes, *layout, "train.micro_batch_tokens=1000")


def test_off_is_a_word_where_it_is_one_of_the_choices(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "weights.verify=off").weights.verify == "off"
    assert load(tmp_path, MINIMAL + "weights: {verify: off}\n").weights.verify == "off"


def test_there_are_as_many_engines_as_urls(tmp_path: Path) -> None:
    there = load(tmp_path, MINIMAL, "engine.placement=external", "engine.urls=[http://a:1/,'http://[::1]:2']").engine
    assert (there.urls, there.count) == (["http://a:1", "http://[::1]:2"], 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.every=10"], None),
        (["eval.sets.aime.every=5"], None),
        (["eval.sets={}"], "checkpoint.keep_best(aime) is no set of held-out prompts; there is none"),
        (["eval.every=7"], "evaluated every 7 steps, and checkpoint.every is 5"),
        (["eval.every=0"], "evaluated every 0 steps, and checkpoint.every is 5"),
        (["eval.every=5", "checkpoint.every=0"], "and checkpoint.every is 0"),
    ],
)
def test_the_best_checkpoint_is_one_that_is_evaluated(
    tmp_path: Path, overrides: list[str], message: str | None
) -> None:
    settings = ["eval.sets={aime: {data: a}}", "checkpoint.keep_best=aime", "checkpoint.every=5", *overrides]
    if message is None:
        assert load(tmp_path, MINIMAL, *settings).checkpoint.keep_best == "aime"
        return
    with pytest.raises(ConfigError) as error:
        load(tmp_path, MINIMAL, *settings)
    assert message in str(error.value)


def test_the_evaluation_of_the_paper() -> None:
    config = config_file.load(Path(__file__).parents[1] / "configs/eval_math.yaml")
    sets = config.held_out
    assert list(sets) == ["aime2024", "aime2024-p1", "aime2025", "amc2023", "math500", "gsm8k"]
    hows = {name: (its.samples, its.temperature, its.top_p, its.rule) for name, its in sets.items()}
    published = (32, 1.0, 0.7, "dapo")
    assert hows["aime2024"] == hows["aime2025"] == hows["amc2023"] == published
    assert hows["aime2024-p1"] == (32, 1.0, 1.0, "dapo") and sets["aime2024"].source == sets["aime2024-p1"].source
    assert (hows["math500"], hows["gsm8k"]) == ((4, 1.0, 0.7, "lenient"), (4, 1.0, 0.7, "dapo"))
    assert (config.rollout.max_response_tokens, config.data.max_prompt_tokens) == (20_480, 2048)
    asks, reminds = "Solve the following math problem step by step. The last line", 'on its own line after "Answer:".'
    assert all(its.data.template.startswith(asks) and its.data.template.endswith(reminds) for its in sets.values())


@pytest.mark.parametrize(
    ("overrides", "sleeps", "offload"),
    [
        ([], False, ()),
        (["memory.offload=[optimizer]"], False, ("optimizer",)),
        (["engine.placement=colocated"], True, ("optimizer", "gradients", "parameters")),
        (["engine.placement=colocated", "memory.offload=[gradients]"], True, ("gradients",)),
        (["engine.placement=colocated", "memory.offload=[]"], True, ()),
        (["engine.placement=colocated", "engine.sleep=false"], False, ()),
    ],
)
def test_colocated_engines_sleep_and_the_actor_makes_room_for_them(
    tmp_path: Path, overrides: list[str], sleeps: bool, offload: tuple[str, ...]
) -> None:
    config = load(tmp_path, MINIMAL, *overrides)
    assert (config.engine.sleeps, config.offload) == (sleeps, offload)
