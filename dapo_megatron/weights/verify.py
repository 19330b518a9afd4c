"""What a push is compared by: which tensors it has to bring, and what became of each of them on its way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from dapo_megatron.errors import EngineError
from dapo_megatron.weights.buckets import HOST, Named, flat_bytes, nbytes, unflatten
from dapo_megatron.weights.checksum import checksums
from dapo_megatron.weights.rooms import Rooms

Has = tuple[Mapping[str, Tensor], Mapping[str, Sequence[str]]]
"""What an engine has: the parameters of this process, and of each module that joins the rows of others its name and
theirs, in this order."""
_SHOWN = 3
"""How many tensors a message names."""


class TransferError(EngineError):
    """Weights are not what they have to be."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """The tensors that every push brings. Sender and receivers get it once; a tensor is then its index in here.

    >>> Inventory(names=["model.norm.weight"], dtypes=["bfloat16"], shapes=[[5120]]).index
    {'model.norm.weight': 0}
    """

    names: list[str]
    """As in a Hugging Face checkpoint, each once."""
    dtypes: list[str]
    """As they travel."""
    shapes: list[list[int]]

    @property
    def index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    @property
    def sizes(self) -> list[int]:
        """In bytes."""
        return [nbytes(*spec) for spec in zip(self.dtypes, self.shapes, strict=True)]

    def describe(self, indices: Iterable[int]) -> dict[str, Any]:
        """Return names, dtypes and shapes of some; JSON."""
        chosen = list(indices)
        columns = {"names": self.names, "dtypes": self.dtypes, "shapes": self.shapes}
        return {key: [column[index] for index in chosen] for key, column in columns.items()}


class Tally:
    """Counts the tensors of a push: each comes once.

    Raises:
        TransferError: from every method, by name.
    """

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self._index = inventory.index
        self._seen: set[int] = set()

    def begin(self) -> None:
        """A push begins; one that was cut short is forgotten."""
        self._seen.clear()

    def find(self, bucket: Named) -> list[int]:
        """Return the indices of tensors that are about to be sent."""
        if unknown := [name for name, _ in bucket if name not in self._index]:
            raise TransferError(f"the model has no {_some(unknown)}, which a push was to bring{self._of()}")
        indices = [self._index[name] for name, _ in bucket]
        for index, (name, tensor) in zip(indices, bucket, strict=True):
            wanted = (self.inventory.dtypes[index], self.inventory.shapes[index])
            given = (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            if given != wanted:
                raise TransferError(f"{name} is {given[0]} {given[1]}, and the model has {wanted[0]} {wanted[1]}")
        return indices

    def count(self, indices: Sequence[int]) -> None:
        """Take note of tensors that come."""
        size = len(self.inventory.names)
        if unknown := [index for index in indices if not 0 <= index < size]:
            raise TransferError(
                f"the model has no tensors number {unknown[:_SHOWN]}, which a push was to bring{self._of()}"
            )
        twice: list[str] = []
        for index in indices:
            if index in self._seen and self.inventory.names[index] not in twice:
                twice.append(self.inventory.names[index])
            self._seen.add(index)
        if twice:
            raise TransferError(f"a push brings {_some(twice)} twice")

    def end(self) -> None:
        """The push is over: nothing may be missing."""
        if missing := [name for index, name in enumerate(self.inventory.names) if index not in self._seen]:
            raise TransferError(f"a push has left out {_some(missing)}{self._of()}")

    def _of(self) -> str:
        return f"; the model has {len(self.inventory.names)} tensors"


@dataclass(frozen=True, slots=True)
class Share:
    """What a process has of every tensor, where several have the model together (tensor parallel).

    >>> Share(1, 4, lambda: ({}, {})).rank
    1
    """

    rank: int
    """Its place among them."""
    ranks: int
    has: Callable[[], Has]
    """What it has; the forms of it are asked for before anything is loaded."""


@dataclass(frozen=True, slots=True)
class _Found:
    """Where a tensor may be, byte for byte."""

    there: Tensor
    cut: tuple[int, int, int] | None
    """Dimension, start and length of the part of the tensor that is there; None means all of it."""


class Arrivals:
    """A receiver's account of a push: which tensors have come, with which bytes, and what became of them.

    Args:
        inventory: `Inventory`'s fields.
        device: where buckets arrive.
        share: where this process has the model together with others.

    Raises:
        TransferError: from every method, by name.
    """

    def __init__(self, inventory: Mapping[str, Any], device: torch.device = HOST, share: Share | None = None) -> None:
        self._share = share if share and share.ranks > 1 else None
        self._inventory = Inventory(**inventory)
        self._index, self._sizes = self._inventory.index, self._inventory.sizes
        self._tally = Tally(self._inventory)
        self._sums: dict[str, int] = {}
        """Name -> checksum, of what came in this push or is kept."""
        self._came: dict[str, int | None] = {}
        """The same of what came, None without a checksum; and then of all that the engine has."""
        self._has: dict[str, int | None] = {}
        """What it had after the last push that was whole."""
        self._cut_sums: dict[str, int] = {}
        """The checksum of this process's part of a tensor, as it came last."""
        self._rooms = Rooms(device)
        self._kept: dict[str, ref[Tensor]] = {}
        """What the engine was given to load. It lets go of it when it has."""
        self._loaded_as_sent: set[str] | None = None
        """Which tensors the engine keeps byte for byte, as the first push showed."""
        self._confirmed: set[str] = set()
        """Those of them that were found to be there in this push."""

    def begin(self) -> None:
        self._tally.begin()
        self._sums, self._kept, self._came, self._confirmed = {}, {}, {}, set()

    def allocate(self, tensors: Sequence[int]) -> Tensor:
        """Count the tensors of a bucket, and make room for it."""
        self._tally.count(tensors)
        described = self._inventory.describe(tensors)
        return self._rooms.take(flat_bytes(described["dtypes"], described["shapes"]))

    def keep(self, tensors: Sequence[int], sums: Sequence[int] | None) -> None:
        """Count tensors that do not come, because they are what they were.

        Args:
            sums: their checksums; None where these are not wanted.
        """
        self._tally.count(tensors)
        names = [self._inventory.names[index] for index in tensors]
        wanted: dict[str, int | None] = dict(zip(names, sums or [None] * len(names), strict=True))
        if wrong := [name for name, value in wanted.items() if value != self._has.get(name, "nothing")]:
            raise TransferError(f"{_some(wrong)}: left out as unchanged, but the last push brought other bytes")
        self._came |= {name: self._has[name] for name in names}
        if sums is not None:
            self._sums |= dict(zip(names, sums, strict=True))

    def sizes(self, tensors: Sequence[int]) -> list[int]:
        """Return the bytes of each."""
        return [self._sizes[index] for index in tensors]

    def unpack(self, flat: Tensor, tensors: Sequence[int], sums: Sequence[int] | None) -> Named:
        """Take a bucket apart that has come.

        An engine may go on reading the tensors of earlier buckets until a layer is whole. So these are looked at again:
        whoever reuses their memory too early changes them.

        Args:
            sums: the checksums of what was sent; None where these are not wanted.
        """
        return self._noted(self._check(unflatten(flat, **self._inventory.describe(tensors)), sums), sums)

    def load(
        self,
        flat: Tensor,
        tensors: Sequence[int],
        sums: Sequence[int] | None,
        load: Callable[[Named], object],
        has: Callable[[], Has],
    ) -> None:
        """Have the engine load a bucket that has come, and compare it as `unpack` does.

        From the second push on, what the engine keeps byte for byte, and has when it has loaded the bucket, is compared
        there alone, while it is still in the processor's cache.
        """
        if sums is None or self._loaded_as_sent is None:
            load(self.unpack(flat, tensors, sums))
            return
        named = unflatten(flat, **self._inventory.describe(tensors))
        load(self._noted(named, sums))
        came = dict(zip((name for name, _ in named), sums, strict=True))
        self._sums |= came
        self._came |= came
        self._confirmed |= self._same([name for name in came if name in self._loaded_as_sent], *has())
        # A part that is there as it came says nothing of whether it came as it was sent.
        others = [(name, x) for name, x in named if name not in self._confirmed or name in self._cut_sums]
        self._check(others, [came[name] for name, _ in others])

    def take(self, named: Named, sums: Sequence[int] | None) -> Named:
        """Count tensors that are here by themselves, by name, and compare them as `unpack` does."""
        self._tally.count(self._tally.find(named))
        return self._noted(self._check(named, sums), sums)

    def _check(self, named: Named, sums: Sequence[int] | None) -> Named:
        self._came |= dict.fromkeys((name for name, _ in named), None)
        if sums is None:
            return named
        kept = {name: tensor for name, kept in self._kept.items() if (tensor := kept()) is not None}
        self._compare(kept, self._sums, "was overwritten in this process before the engine had loaded it")
        came = dict(zip((name for name, _ in named), sums, strict=True))
        self._compare(dict(named), came, "has arrived with other bytes than were sent")
        self._sums |= came
        self._came |= came
        self._kept = {name: ref(tensor) for name, tensor in [*kept.items(), *named]}
        return named

    def end(self) -> None:
        """All buckets have come."""
        self._tally.end()
        self._has, self._kept = self._came, {}

    def loaded(self, parameters: Mapping[str, Tensor], parts: Mapping[str, Sequence[str]]) -> None:
        """Look at what the engine has (`Has`) after loading, as far as it keeps tensors as they come.

        It may join, cut, transpose or pack them. What it keeps byte for byte in the first push, or this process its
        share of, it has to keep so in all that follow.
        """
        if self._loaded_as_sent is None:
            self._loaded_as_sent = self._same(self._sums, parameters, parts)
            return
        left = (self._loaded_as_sent & self._sums.keys()) - self._confirmed
        there = {name for name in left if self._find_loaded(name, parameters, parts)}
        if other := sorted(there - self._same(there, parameters, parts)):
            raise TransferError(f"{_some(other)}: the engine has loaded the push, and has other bytes than came")

    def _same(
        self, names: Iterable[str], parameters: Mapping[str, Tensor], parts: Mapping[str, Sequence[str]]
    ) -> set[str]:
        """Return which of these tensors, that have come, the engine has byte for byte, or this process its part of."""
        found = {name: place for name in names if (place := self._find_loaded(name, parameters, parts))}
        sums = zip(found, checksums([place.there for place in found.values()]), strict=True)
        wanted = {name: self._cut_sums.get(name) if place.cut else self._sums[name] for name, place in found.items()}
        return {name for name, value in sums if value == wanted[name]}

    def _noted(self, named: Named, sums: Sequence[int] | None) -> Named:
        """Take note of this process's part of tensors that have come."""
        if not self._share or sums is None:
            return named
        cuts: dict[str, Tensor] = {}
        parameters, parts = self._share.has()
        for name, tensor in named:
            if (found := self._find(name, parameters, parts)) and found.cut:
                cuts[name] = tensor.narrow(*found.cut)
        self._cut_sums |= dict(zip(cuts, checksums(list(cuts.values())), strict=True))
        return named

    def _find_loaded(
        self, name: str, parameters: Mapping[str, Tensor], parts: Mapping[str, Sequence[str]]
    ) -> _Found | None:
        found = self._find(name, parameters, parts)
        return None if found is None or found.there.is_meta else found

    def _find(self, name: str, parameters: Mapping[str, Tensor], parts: Mapping[str, Sequence[str]]) -> _Found | None:
        """Return where a tensor may be; None where there is nothing of its form."""
        place, start, whole = name, 0, 0
        for joined, members in parts.items():
            for position, member in enumerate(members):
                if name not in parameters and f".{member}." in name:
                    names = [name.replace(f".{member}.", f".{other}.") for other in members]
                    if any(other not in self._index for other in names):
                        return None
                    place = name.replace(f".{member}.", f".{joined}.")
                    rows = [self._inventory.shapes[self._index[other]][0] for other in names]
                    start, whole = sum(rows[:position]), sum(rows)
        parameter, shape = parameters.get(place), self._inventory.shapes[self._index[name]]
        if parameter is None or parameter.dtype != getattr(torch, self._inventory.dtypes[self._index[name]]):
            return None
        if len(shape) != parameter.dim() or not shape:
            return None
        parameter, rows_there = parameter.detach(), len(parameter)
        if list(parameter.shape[1:]) == shape[1:]:
            # A vocabulary may have more rows than there are tokens. What joins others and has fewer has a share of
            # each.
            if max(start + shape[0], whole) <= rows_there:
                return _Found(parameter[start : start + shape[0]], None)
            return self._rows_of_share(parameter, shape[0], start, whole)
        share = self._share
        if share and len(shape) == 2 and shape[0] == rows_there and shape[1] == parameter.shape[1] * share.ranks:
            return _Found(parameter, (1, share.rank * parameter.shape[1], parameter.shape[1]))
        return None

    def _rows_of_share(self, parameter: Tensor, rows: int, start: int, whole: int) -> _Found | None:
        """Return where this process's share of `rows` is, which begin at row `start` of the `whole` that is joined."""
        if not self._share:
            return None
        rank, ranks = self._share.rank, self._share.ranks
        if whole:
            if len(parameter) * ranks != whole or rows % ranks or start % ranks:
                return None
            each = rows // ranks
            return _Found(parameter[start // ranks : start // ranks + each], (0, rank * each, each))
        each = len(parameter)
        first, count = rank * each, min(each, rows - rank * each)
        if each * ranks < rows or count <= 0:
            return None
        return _Found(parameter[:count], (0, first, count))

    def _compare(self, tensors: Mapping[str, Tensor], wanted: Mapping[str, int], problem: str) -> None:
        found = checksums(list(tensors.values()))
        if wrong := [name for name, value in zip(tensors, found, strict=True) if value != wanted[name]]:
            raise TransferError(f"{_some(wrong)} {problem}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
