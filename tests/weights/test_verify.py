from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from dapo_megatron.weights.buckets import Named, describe, flatten
from dapo_megatron.weights.checksum import checksums
from dapo_megatron.weights.verify import Arrivals, Inventory, Share, Tally, TransferError

SHAPES = {
    "model.embed_tokens.weight": (10, 4),
    "model.layers.0.self_attn.q_proj.weight": (6, 4),
    "model.layers.0.self_attn.k_proj.weight": (2, 4),
    "model.layers.0.self_attn.v_proj.weight": (2, 4),
    "model.norm.weight": (4,),
}
NAMES = list(SHAPES)
PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


INVENTORY = Inventory(**describe(list(weights(0).items())))


@pytest.fixture
def tally() -> Tally:
    return Tally(INVENTORY)


@pytest.fixture
def arrivals() -> Arrivals:
    return Arrivals(asdict(INVENTORY))


def test_a_push_of_every_tensor_in_any_order_is_whole(tally: Tally) -> None:
    for _ in range(2):
        tally.begin()
        for bucket in (NAMES[3:], NAMES[:3]):
            tally.count(tally.find([(name, weights(1)[name]) for name in bucket]))
        tally.end()


@pytest.mark.parametrize(
    ("indices", "says"),
    [
        ([0, 1, 2, 4], "has left out model.layers.0.self_attn.v_proj.weight; the model has 5 tensors"),
        ([4], r"has left out model.embed_tokens.weight, .*q_proj.weight, .*k_proj.weight and 1 more"),
        ([0, 1, 2, 3, 4, 1], "brings model.layers.0.self_attn.q_proj.weight twice"),
        ([0, 5], r"no tensors number \[5\]"),
        ([-1], r"no tensors number \[-1\]"),
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_what_is_missing_or_too_many_is_named(tally: Tally, indices: list[int], says: str, together: bool) -> None:
    with pytest.raises(TransferError, match=says):
        for bucket in [indices] if together else [[index] for index in indices]:
            tally.count(bucket)
        tally.end()


def test_a_push_that_was_cut_short_is_forgotten(tally: Tally) -> None:
    tally.count([0, 1])
    tally.begin()
    tally.count([0, 1, 2, 3, 4])
    tally.end()


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (("lm_head.weight", torch.zeros(1)), "no lm_head.weight, which a push was to bring; the model has 5 tensors"),
        (("model.norm.weight", torch.zeros(4)), r"model.norm.weight is float32 \[4\], .* has bfloat16 \[4\]"),
        (
            ("model.norm.weight", torch.zeros(2, 2).bfloat16()),
            r"is bfloat16 \[2, 2\], and the model has bfloat16 \[4\]",
        ),
    ],
)
def test_a_tensor_of_another_form_is_refused_where_it_is_sent(
    tally: Tally, tensor: tuple[str, Tensor], says: str
) -> None:
    with pytest.raises(TransferError, match=says):
        tally.find([tensor])


def send(arrivals: Arrivals, tensors: dict[str, Tensor], names: Sequence[str], room: Tensor | None = None) -> Named:
    """Have a bucket arrive; `room` is memory that it is put into instead of its own."""
    bucket = [(name, tensors[name]) for name in names]
    indices = [NAMES.index(name) for name in names]
    flat = arrivals.allocate(indices)
    if room is not None:
        flat = room[: len(flat)]
    flat.copy_(flatten(bucket))
    return arrivals.unpack(flat, indices, checksums([tensor for _, tensor in bucket]))


def test_what_has_arrived_is_what_was_sent(arrivals: Arrivals) -> None:
    arrivals.begin()
    came = send(arrivals, weights(1), NAMES)
    arrivals.end()
    assert [name for name, _ in came] == NAMES
    assert all(torch.equal(tensor, weights(1)[name]) for name, tensor in came)


def test_a_flipped_bit_is_named(arrivals: Arrivals) -> None:
    bucket = list(weights(1).items())
    flat = flatten(bucket)
    flat[-1] ^= 64
    sums = checksums([tensor for _, tensor in bucket])
    with pytest.raises(TransferError, match=r"^model.norm.weight has arrived with other bytes than were sent$"):
        arrivals.unpack(flat, range(5), sums)
    assert len(arrivals.unpack(flat, range(5), None)) == 5, "checksums are not wanted"


def test_memory_that_is_reused_while_the_engine_still_reads_it_is_noticed(arrivals: Arrivals) -> None:
    room = torch.empty(1000, dtype=torch.uint8)
    arrivals.begin()
    whole = send(arrivals, weights(1), NAMES[:1], room)
    del whole
    half = send(arrivals, weights(1), NAMES[1:3], room)  # the engine had let go of the first
    with pytest.raises(TransferError, match=r"^model.layers.0.self_attn.q_proj.weight was overwritten in this"):
        send(arrivals, weights(1), NAMES[3:], room)
    assert half


def test_memory_of_their_own_is_left_alone(arrivals: Arrivals) -> None:
    arrivals.begin()
    kept = [send(arrivals, weights(1), [name]) for name in NAMES]
    arrivals.end()
    assert len(kept) == 5


def parameters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What an engine makes of them: rows joined, a vocabulary that is padded, a matrix that is transposed."""
    q, k, v = (tensors[f"model.layers.0.self_attn.{letter}_proj.weight"] for letter in "qkv")
    return {
        "model.embed_tokens.weight": torch.cat([tensors["model.embed_tokens.weight"], torch.zeros(6, 4).bfloat16()]),
        "model.layers.0.self_attn.qkv_proj.weight": torch.cat([q, k, v]),
        "model.norm.weight": tensors["model.norm.weight"].clone(),
    }


def load(arrivals: Arrivals, sent: dict[str, Tensor], has: dict[str, Tensor]) -> None:
    arrivals.begin()
    send(arrivals, sent, NAMES)
    arrivals.end()
    arrivals.loaded(has, PARTS)


@pytest.mark.parametrize("stale", ["model.embed_tokens.weight", *(f"{letter}_proj.weight" for letter in "qkv")])
def test_an_engine_that_keeps_old_weights_is_noticed(arrivals: Arrivals, stale: str) -> None:
    old, new = weights(1), weights(2)
    load(arrivals, old, parameters(old))
    load(arrivals, new, parameters(new))
    kept = {name: old[name] if name.endswith(stale) else tensor for name, tensor in new.items()}
    with pytest.raises(TransferError, match=rf"^[^,]*{stale}: the engine has loaded the push, and has other bytes"):
        load(arrivals, new, parameters(kept))


def test_a_share_of_joined_rows_is_not_taken_for_the_whole_of_one_of_them(arrivals: Arrivals) -> None:
    """In tensor parallel, half of q, k and v together may have as many rows as q, and all be zeros at first."""
    for sent in ({name: torch.zeros_like(tensor) for name, tensor in weights(1).items()}, weights(2)):
        has = parameters(sent)
        joined = has["model.layers.0.self_attn.qkv_proj.weight"]
        has["model.layers.0.self_attn.qkv_proj.weight"] = joined[-(len(joined) // 2) :]
        load(arrivals, sent, has)


def test_what_an_engine_keeps_in_another_form_is_left_to_the_canary(arrivals: Arrivals) -> None:
    for seed in (1, 2):
        sent = weights(seed)
        has = parameters(sent)
        has["model.layers.0.self_attn.qkv_proj.weight"] = has["model.layers.0.self_attn.qkv_proj.weight"].flip(0)
        has["model.embed_tokens.weight"] = torch.empty(0, dtype=torch.bfloat16)
        has["model.norm.weight"] = has["model.norm.weight"].float()
        load(arrivals, sent, has)
    load(arrivals, weights(3), {})


class Loader:
    """An engine that loads what comes into parameters of its own, at once, or when a layer is whole."""

    def __init__(self, arrivals: Arrivals, *, late: bool = False) -> None:
        self._arrivals, self._late = arrivals, late
        self._loaded = weights(0)
        self.has = parameters(self._loaded)
        self._views: list[tuple[str, Tensor]] = []

    def load(self, bucket: Named) -> None:
        self._views += bucket
        if not self._late or len(self._views) == len(NAMES):
            self._loaded |= {name: tensor.clone() for name, tensor in self._views}
            self.has = parameters(self._loaded)
            self._views.clear()

    def push(self, sent: dict[str, Tensor], *, room: Tensor | None = None, hurt: str | None = None) -> None:
        """Buckets of a tensor each; `hurt` comes with a flipped bit."""
        self._arrivals.begin()
        self._views.clear()
        for index, name in enumerate(NAMES):
            flat = self._arrivals.allocate([index]) if room is None else room[: sent[name].nbytes]
            flat.copy_(flatten([(name, sent[name])]))
            flat[1] ^= name == hurt
            sums = checksums([sent[name]])
            self._arrivals.load(flat, [index], sums, self.load, lambda: (self.has, PARTS))
        self._arrivals.loaded(self.has, PARTS)


@pytest.mark.parametrize("late", [False, True])
def test_what_an_engine_loads_is_what_was_sent(arrivals: Arrivals, late: bool) -> None:
    loader = Loader(arrivals, late=late)
    for seed in (1, 2, 3):
        loader.push(weights(seed))
        assert all(torch.equal(tensor, loader.has[name]) for name, tensor in parameters(weights(seed)).items())
    for hurt in NAMES:
        with pytest.raises(TransferError, match=rf"^{hurt} has arrived with other bytes than were sent$"):
            loader.push(weights(4), hurt=hurt)


def test_bytes_are_read_once_where_the_engine_has_them_when_it_has_loaded_them(
    arrivals: Arrivals, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = 0

    def counting(tensors: Sequence[Tensor]) -> list[int]:
        nonlocal compared
        compared += sum(tensor.nbytes for tensor in tensors)
        return checksums(tensors)

    monkeypatch.setattr("dapo_megatron.weights.verify.checksums", counting)
    loader, size = Loader(arrivals), sum(tensor.nbytes for tensor in weights(0).values())
    for seed, times in ((1, 2), (2, 1), (3, 1)):
        compared = 0
        loader.push(weights(seed))
        assert compared == times * size


def test_memory_that_is_reused_before_an_engine_has_loaded_it_is_noticed(arrivals: Arrivals) -> None:
    loader = Loader(arrivals, late=True)
    loader.push(weights(1))
    with pytest.raises(TransferError, match=r"^model.embed_tokens.weight was overwritten in this process before"):
        loader.push(weights(2), room=torch.empty(1000, dtype=torch.uint8))


def test_an_engine_that_does_not_load_what_came_is_noticed(arrivals: Arrivals, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader(arrivals)
    loader.push(weights(1))
    monkeypatch.setattr(loader, "load", lambda bucket: None)
    with pytest.raises(TransferError, match=r"and 2 more: the engine has loaded the push, and has other bytes"):
        loader.push(weights(2))


OUT = "model.layers.0.self_attn.o_proj.weight"
CUT_SHAPES = {**SHAPES, OUT: (4, 6)}
CUT_INVENTORY = Inventory(**describe([(name, torch.empty(shape).bfloat16()) for name, shape in CUT_SHAPES.items()]))


def whole(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in CUT_SHAPES.items()}


def share_of(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """What one of two processes has: rows of q, k and v, columns of what follows, a vocabulary of 12 rows, a norm."""
    q, k, v = (tensors[f"model.layers.0.self_attn.{letter}_proj.weight"].chunk(2)[rank] for letter in "qkv")
    padded = torch.cat([tensors["model.embed_tokens.weight"], torch.zeros(2, 4).bfloat16()])
    return {
        "model.embed_tokens.weight": padded.chunk(2)[rank],
        "model.layers.0.self_attn.qkv_proj.weight": torch.cat([q, k, v]),
        OUT: tensors[OUT].chunk(2, 1)[rank].contiguous(),
        "model.norm.weight": tensors["model.norm.weight"].clone(),
    }


class OneOfTwo:
    """A process that has half of a model."""

    def __init__(self, rank: int, *, bucketwise: bool) -> None:
        self._rank, self._bucketwise = rank, bucketwise
        self.has = share_of(whole(0), rank)
        self._arrivals = Arrivals(asdict(CUT_INVENTORY), share=Share(rank, 2, lambda: (self.has, PARTS)))

    def push(self, sent: dict[str, Tensor], *, keeps: dict[str, Tensor] | None = None, hurt: str | None = None) -> None:
        """
        Args:
            keeps: what it does not load.
            hurt: comes with a flipped bit in its last byte.
        """
        self._arrivals.begin()
        has = share_of(sent | (keeps or {}), self._rank)
        for index, (name, tensor) in enumerate(sent.items()):
            flat = self._arrivals.allocate([index])
            flat.copy_(flatten([(name, tensor)]))
            flat[tensor.nbytes - 1] ^= name == hurt
            if self._bucketwise:
                load = (lambda _: setattr(self, "has", has)) if name == list(sent)[-1] else (lambda _: None)
                self._arrivals.load(flat, [index], checksums([tensor]), load, lambda: (self.has, PARTS))
            else:
                self._arrivals.unpack(flat, [index], checksums([tensor]))
        self._arrivals.end()
        self.has = has
        self._arrivals.loaded(self.has, PARTS)


@pytest.mark.parametrize("bucketwise", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", list(CUT_SHAPES))
def test_a_process_that_has_kept_its_old_share_of_a_tensor_is_noticed(name: str, rank: int, bucketwise: bool) -> None:
    process = OneOfTwo(rank, bucketwise=bucketwise)
    for seed in (1, 2, 3):
        process.push(whole(seed))
    with pytest.raises(TransferError, match=rf"^{name}: the engine has loaded the push, and has other bytes than came"):
        process.push(whole(4), keeps={name: whole(3)[name]})


@pytest.mark.parametrize("bucketwise", [True, False])
@pytest.mark.parametrize("name", list(CUT_SHAPES))
def test_a_bit_that_is_flipped_in_the_share_of_another_process_is_noticed(name: str, bucketwise: bool) -> None:
    process = OneOfTwo(0, bucketwise=bucketwise)
    process.push(whole(1))
    process.push(whole(2))
    with pytest.raises(TransferError, match=rf"^{name} has arrived with other bytes than were sent"):
        process.push(whole(3), hurt=name)


def test_shares_that_are_not_even_are_left_to_the_canary() -> None:
    """Fewer heads of keys and values than processes: each has a copy."""
    has = share_of(whole(1), 0)
    has["model.layers.0.self_attn.qkv_proj.weight"] = torch.zeros(7, 4).bfloat16()
    arrivals = Arrivals(asdict(CUT_INVENTORY), share=Share(0, 2, lambda: (has, PARTS)))
    for seed in (1, 2):
        arrivals.begin()
        for index, tensor in enumerate(whole(seed).values()):
            flat = arrivals.allocate([index])
            flat.copy_(flatten([("", tensor)]))
            arrivals.unpack(flat, [index], checksums([tensor]))
        has |= {**share_of(whole(seed), 0), "model.layers.0.self_attn.qkv_proj.weight": torch.zeros(7, 4).bfloat16()}
        arrivals.loaded(has, PARTS)
