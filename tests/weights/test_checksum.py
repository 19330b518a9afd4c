from __future__ import annotations

import numpy as np
import pytest
import torch

from dapo_megatron.weights.checksum import checksums

WRAP = 2**64


def scrambled(number: int) -> int:
    for _ in range(2):
        number = (number ^ number >> 32) * 0x3F58476D1CE4E5B9 % WRAP
    return number ^ number >> 32


def by_integers(tensor: torch.Tensor) -> int:
    """The same number by Python's integers, one word after the other."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    words = np.frombuffer(data + bytes(-len(data) % 8), np.uint64).tolist()
    rows = len(words) // 1024
    columns = [sum(words[column : rows * 1024 : 1024]) for column in range(1024)]
    sums = [sum(words[row * 1024 : (row + 1) * 1024]) for row in range(rows)]
    parts = [*columns, *sums, *words[rows * 1024 :]]
    total = sum(scrambled((part + 0x1E3779B97F4A7C15 * place) % WRAP) for place, part in enumerate(parts)) % WRAP
    return total - WRAP if total >= WRAP // 2 else total


def random_bytes(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 2048, 8 * 1024, 8 * 1024 + 3, 5 * 8 * 1024 + 8 * 17, 100_001])
def test_it_is_what_it_says(size: int) -> None:
    data = random_bytes(size)
    assert checksums([data]) == [by_integers(data)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_only_the_bytes_matter(dtype: torch.dtype) -> None:
    data = random_bytes(240) % 2
    typed = data.view(dtype).view(-1, 6) if dtype != torch.bool else data.bool()
    wide = torch.stack([typed, typed], dim=-1)
    assert not wide[..., 0].is_contiguous()
    assert len(set(checksums([data, typed, wide[..., 0]]))) == 1


def test_it_does_not_depend_on_where_in_memory_the_bytes_are() -> None:
    data = random_bytes(4096)
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), data])[3:]
    assert shifted.storage_offset() == 3
    assert checksums([shifted]) == checksums([data])


def flipped(data: torch.Tensor, *bits: int) -> torch.Tensor:
    other = data.clone()
    for bit in bits:
        other[bit // 8] ^= 1 << bit % 8
    return other


@pytest.mark.parametrize("size", [200, 2 * 8 * 1024])
def test_every_flipped_bit_is_noticed(size: int) -> None:
    data = random_bytes(size)
    bits = range(0, 8 * size, max(1, 8 * size // 1601))
    found = checksums([data, *(flipped(data, bit) for bit in bits)])
    assert len(set(found)) == 1 + len(bits)


@pytest.mark.parametrize("size", [200, 4 * 8 * 1024])
def test_so_are_two_in_the_highest_bits_of_words(size: int) -> None:
    data = torch.zeros(size, dtype=torch.uint8)
    words = range(0, size // 8, max(1, size // 8 // 60))
    pairs = [flipped(data, 64 * one + 63, 64 * other + 63) for one in words for other in words if one < other]
    assert len(set(checksums([data, *pairs]))) == 1 + len(pairs)


def test_what_changed_places_is_noticed() -> None:
    rows = random_bytes(64 * 8 * 1024).view(64, 8 * 1024)
    moved = [rows, rows.flip(0), rows.roll(1, 0), rows.roll(8, 1), rows.view(128, -1).flip(0)]
    assert len(set(checksums(moved))) == len(moved)


@pytest.mark.gpu
def test_a_gpu_comes_to_the_same() -> None:
    data = [random_bytes(size) for size in (0, 5, 8 * 1024, 1_000_003)]
    assert checksums([tensor.cuda() for tensor in data]) == checksums(data)
