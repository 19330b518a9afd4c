from __future__ import annotations

import time

import pytest

from tests.helpers.distributed import run_distributed


def _fail_on_rank_1() -> int:
    import os

    if os.environ["RANK"] == "1":
        raise KeyError("the one that matters")
    time.sleep(60)
    return 0


@pytest.mark.multiproc
def test_a_failing_rank_is_shown_and_the_others_do_not_hold_it_up() -> None:
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 1 failed:(.|\n)*the one that matters(.|\n)*ranks \[0\] had not"):
        run_distributed(_fail_on_rank_1, 2, timeout=50)
    assert time.monotonic() - begin < 40
