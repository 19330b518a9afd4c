import pytest

from dapo_megatron.reward.overlong import soft_punishment

# (max_length, cache) -> length -> punishment. The first is the published run.
EXACT = {
    (20480, 4096): {
        **dict.fromkeys((0, 1, 16383, 16384), 0.0),
        16385: -0.000244140625,
        16400: -0.00390625,
        17408: -0.25,
        18432: -0.5,
        19456: -0.75,
        20479: -0.999755859375,
        **dict.fromkeys((20480, 20481, 30000), -1.0),
    },
    (8192, 4096): {4096: 0.0, 4097: -0.000244140625, 6144: -0.5, 8191: -0.999755859375, 8192: -1.0, 8193: -1.0},
    (2048, 512): {1536: 0.0, 1537: -0.001953125, 1792: -0.5, 2048: -1.0},
    (8, 4): {0: 0.0, 4: 0.0, 5: -0.25, 6: -0.5, 7: -0.75, 8: -1.0, 9: -1.0, 10: -1.0},
    (16, 16): {0: 0.0, 1: -0.0625, 8: -0.5, 16: -1.0, 17: -1.0},
}


@pytest.mark.parametrize(
    ("length", "max_length", "cache", "punishment"),
    [(length, *sizes, value) for sizes, values in EXACT.items() for length, value in values.items()],
)
def test_exact_values(length, max_length, cache, punishment):
    assert soft_punishment(length, max_length, cache) == punishment
