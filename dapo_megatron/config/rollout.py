"""The sections of where prompts come from and how responses are sampled."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from dapo_megatron.config.section import (
    FilePath,
    FilePattern,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Temperature,
)


def _with_place(template: str) -> str:
    if "{problem}" not in template:
        raise ValueError(f"must hold {{problem}} where the question goes; got {template!r}")
    return template


Template = Annotated[str, AfterValidator(_with_place)]


class DataConfig(Section):
    train: FilePattern
    """Prompts to train on: a .jsonl or .parquet file, or hub:OWNER/NAME[/SPLIT] on the Hugging Face hub."""
    prompt_field: str = "prompt"
    """Where a row keeps its question; dots reach into nested objects. Of chat messages, the last user turn."""
    answer_field: str = "answer"
    """Where a row keeps the gold answer; dots reach into nested objects (reward_model.ground_truth)."""
    template: Template = "{problem}"
    """Text around the question, which replaces {problem}."""
    chat_template: bool = False
    """Wrap the result as one user turn in the tokenizer's chat template."""
    max_prompt_tokens: PositiveInt = 2048
    """Limit on the tokens of a prompt."""
    long_prompts: Literal["refuse", "drop"] = "refuse"
    """What to do with a longer prompt: stop before the run starts, or leave it out and say how many were."""


class RolloutConfig(Section):
    prompts: PositiveInt = 512
    """Groups to train on per step (N of the paper)."""
    responses: Annotated[int, Field(ge=2)] = 16
    """Responses per prompt (G of the paper). An advantage compares responses, so one is not enough."""
    max_response_tokens: PositiveInt = 20_480
    """Cap on generated tokens, the end token included."""
    temperature: Annotated[Temperature, Field(gt=0)] = 1.0
    """Sampling temperature; the trainer computes its log-probs at the same."""
    top_p: Fraction = 1.0
    """Nucleus sampling; 1 is off. The trainer's log-probs are those of the full distribution."""
    stop_token_ids: list[int] = []
    """Tokens that end a response besides the tokenizer's end token."""
    dynamic_sampling: bool = True
    """Train only on groups that are neither all right nor all wrong, and draw prompts until there are enough."""
    generation_batch: PositiveInt | None = None
    """Prompts drawn at a time; null means as many as `prompts`."""
    max_generation_batches: PositiveInt = 10
    """How often to draw prompts before giving up."""
    too_few_groups: Literal["raise", "train"] = "raise"
    """What to do when that is not enough: end the run with the counts, or train on the groups there are."""
    surplus_groups: Literal["discard", "carry"] = "discard"
    """What to do with mixed groups beyond `prompts`: discard them as published, or train on them a step later."""

    @model_validator(mode="after")
    def _filling_needs_dynamic_sampling(self) -> RolloutConfig:
        filling = ("generation_batch", "max_generation_batches", "too_few_groups", "surplus_groups")
        defaults = {name: type(self).model_fields[name].default for name in filling}
        idle = [f"{name}={value!r}" for name in filling if (value := getattr(self, name)) != defaults[name]]
        if idle and not self.dynamic_sampling:
            raise ValueError(
                f"{', '.join(idle)} would do nothing: with dynamic_sampling=false one batch of `prompts` is taken as "
                f"it comes; leave out what fills a batch, or set dynamic_sampling=true"
            )
        return self

    @property
    def batch_size(self) -> int:
        """Responses per step."""
        return self.prompts * self.responses

    @property
    def draw(self) -> int:
        """Prompts per generation batch."""
        return self.generation_batch or self.prompts


def _host_and_port(url: str) -> str:
    parts = urlsplit(url)
    try:
        whole = parts.scheme == "http" and parts.hostname and parts.port
    except ValueError:
        whole = False
    if not whole or url.rstrip("/") != f"http://{parts.netloc}" or "@" in parts.netloc:
        raise ValueError(f"{url!r} is not of the form http://HOST:PORT")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"http://{host}:{parts.port}"  # each in one spelling: an engine counts once


EngineUrl = Annotated[str, AfterValidator(_host_and_port)]


class EngineConfig(Section):
    kind: str = "vllm"
    """What serves the policy for sampling: vllm, sglang, or some.module:name for an adapter of your own."""
    python: FilePath | None = None
    """Interpreter that runs the engine, for one in a virtual environment of its own; null is the trainer's, and with
    sglang on CPU the one that `make sglang-cpu` makes."""
    count: PositiveInt = 1
    """Engines, each with its own copy of the model; a request goes to the one with the least to do. As many as `urls`,
    where these are given."""
    tensor_parallel: PositiveInt = 1
    """GPUs of each engine."""
    placement: Literal["split", "colocated", "external"] = "split"
    """Engines run on the machines of `nodes`: on the GPUs after those of its ranks (split), or on the ranks' own, from
    the first on, with their share of memory taken before the actor's (colocated). On CPU, all share the machine. Or
    they run already, anywhere (external): `dapo-megatron engines` starts them, and `urls` says where they are."""
    nodes: list[NonNegativeInt] | Literal["all"] = [0]
    """Nodes of the run whose machines engines run on, each with the same share of `count`: [0], the machine of rank 0,
    numbers of others, counted in the order of their ranks, or all. At other nodes than 0, engines listen on the address
    that the node has on its way to MASTER_ADDR."""
    urls: list[EngineUrl] = []
    """Where engines answer that run already (placement: external), each as http://HOST:PORT."""
    kinds: list[str] = []
    """The kind of each of `urls`, where these are not all of one; such as [vllm, sglang]."""
    token_file: FilePath | None = None
    """File with the token of engines that run already; null is run.dir/NAME-engines/token, where `dapo-megatron
    engines` leaves it. DAPO_MEGATRON_ENGINE_TOKEN in the environment comes before the file. Engines that a run starts
    have tokens that nobody else knows."""
    host: str = "127.0.0.1"
    """Address that engines listen on, on the machine of rank 0 or where `dapo-megatron engines` runs. At anything but
    loopback, prompts, responses and the token go over a network unencrypted."""
    port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """Port of the first engine of each machine, the next ones follow; null takes free ports."""
    max_sequences: PositiveInt = 512
    """Sequences that one engine decodes at once."""
    sleep: bool | None = None
    """Whether colocated engines give up their memory, weights and KV cache, while the actor trains, and the actor gives
    up what memory.offload names while they sample; null is yes where placement is colocated. What vLLM's and SGLang's
    CPU builds do then frees nothing."""
    memory_fraction: Fraction | None = None
    """Share of each GPU's memory for the engine, which must be free when it starts; null is 0.85, or of a GPU that it
    has in common with a rank 0.6 where it sleeps, and otherwise 0.4."""
    kv_cache_gib: PositiveInt | None = None
    """GiB for the KV cache, on each GPU or on CPU; null is what memory_fraction leaves, and 1 on CPU. An engine whose
    cache has a size of its own is not kept within memory_fraction."""
    startup_seconds: PositiveFloat = 600.0
    """How long an engine may take until it answers, and then until its first token."""
    stall_seconds: PositiveFloat = 45.0
    """How long an engine may go without a sign of life, an answer or, while it writes responses, a new token."""
    max_restarts: NonNegativeInt = 3
    """How often an engine that died, hangs or answers nonsense is started again; once more, and the run saves and ends.
    The count begins anew when the engine has kept the weights of one push until the next."""
    batch_invariant: bool = False
    """On GPUs, use the engine's batch-invariant kernels, which are slower: a response then depends on the weights and
    its seed alone, and not on what else an engine has to do. On CPU it does nothing: docs/architecture.md says how far
    responses are reproducible there."""
    extra_args: list[str] = []
    """More arguments for the engine's own command line."""
    seed: int | None = None
    """Seed of the sampling, from which that of every request is made; null takes train.seed."""

    @property
    def on_other_nodes(self) -> bool:
        """Whether ranks of other machines than the leader's may be asked to start engines."""
        return self.nodes != [0]

    @field_validator("nodes", mode="before")
    @classmethod
    def _numbers_or_all(cls, nodes: Any) -> Any:
        if nodes != "all" and not (isinstance(nodes, list) and all(isinstance(n, int) and n >= 0 for n in nodes)):
            raise ValueError(f"is a list of the numbers of nodes, from 0, such as [0,1], or all; got {nodes!r}")
        return nodes

    @field_validator("nodes")
    @classmethod
    def _every_node_once(cls, nodes: list[int] | Literal["all"]) -> list[int] | Literal["all"]:
        if nodes == "all":
            return nodes
        if not nodes or len(set(nodes)) < len(nodes):
            raise ValueError(f"names each node that has engines once, at least one; got {nodes}; or set it to all")
        return sorted(nodes)

    @model_validator(mode="before")
    @classmethod
    def _as_many_as_urls(cls, given: Any) -> Any:
        urls = given.get("urls") if isinstance(given, dict) else None
        return {"count": len(urls), **given} if isinstance(urls, list) and urls else given

    @property
    def sleeps(self) -> bool:
        """Whether engines give up their memory while the actor trains."""
        return self.placement == "colocated" if self.sleep is None else self.sleep

    @model_validator(mode="after")
    def _who_sleeps_shares_a_gpu(self) -> EngineConfig:
        if self.sleep and self.placement != "colocated":
            whose = "on GPUs of their own" if self.placement == "split" else "started elsewhere"
            raise ValueError(
                f"sleep=true with placement={self.placement}: engines {whose} have no memory that the actor could use "
                f"meanwhile; leave sleep out, or set placement=colocated"
            )
        return self

    @model_validator(mode="after")
    def _urls_are_those_of_external_engines(self) -> EngineConfig:
        if self.urls and self.placement != "external":
            raise ValueError(
                f"urls say where engines run already, but placement is {self.placement}; set placement=external, or "
                f"leave urls out"
            )
        if self.placement == "external" and not self.urls:
            raise ValueError(
                "placement=external is for engines that run already; give their urls=[http://HOST:PORT, ...], which "
                "`dapo-megatron engines` prints"
            )
        if self.kinds and len(self.kinds) != len(self.urls):
            raise ValueError(
                f"kinds({len(self.kinds)}) are for urls({len(self.urls)}), one for each; engines that the run starts "
                f"are all of one kind"
            )
        if self.urls and self.on_other_nodes:
            raise ValueError(
                f"nodes({self.nodes}) say where a run starts engines, but placement=external is for those that run "
                f"already; leave nodes out, or set nodes=[0]"
            )
        if self.urls and self.count != len(self.urls):
            urls = len(self.urls)
            raise ValueError(f"count({self.count}), but {urls} urls; leave count out, or set count={urls}")
        if twice := sorted({url for url in self.urls if self.urls.count(url) > 1}):
            raise ValueError(f"urls: {', '.join(twice)} more than once: an engine counts once")
        return self

    def kind_of(self, index: int) -> str:
        """Return the kind of an engine."""
        return self.kinds[index] if self.kinds else self.kind


class WeightsConfig(Section):
    transport: Literal["gloo", "nccl", "ipc", "disk"] = "gloo"
    """How weights travel from the actor to the engines (docs/weights.md): through a process group, between host
    memories (gloo) or between GPUs (nccl); from the memory of the GPU that rank and engine share (ipc, by CUDA IPC); or
    through files in a folder that all machines share (disk)."""
    folder: FilePath | None = None
    """For transport=disk: where each version is written, in a folder with the run's name; null is weights in the run's
    folder. Two versions have to fit while engines load one; a second run of that name is kept out."""
    bucket_mib: PositiveInt = 256
    """Tensors travel in buckets, or files, of about this size."""
    push_seconds: PositiveFloat = 300.0
    """How long an engine may take over each part of a push: to join, to get ready, for a bucket, to use the weights, to
    answer the canary."""
    verify: Literal["full", "checksums", "off"] = "full"
    """How a push finds out that an engine has not what was sent. Always: a tensor that is missing, comes twice or is
    none of the model's. With checksums: one whose bytes changed on the way, in a receiver's memory, or in the engine
    where that keeps it as it came. In full: also a canary, a prompt that every engine answers before and after each
    push, and whose log-probs are compared with the actor's."""
    delta: bool = True
    """Leave layers out of a push that the engines have as they are, by checksum. An engine that was started again gets
    everything, and so does one that cannot keep any (engine.kind=sglang). Through a folder, all travel."""
    canary_tolerance: PositiveFloat | None = None
    """Most nats by which the log-probs of the canary's tokens may differ from the actor's in the mean; null is 1e-4 in
    float32 and 0.1 in bfloat16."""
