from __future__ import annotations

from typing import Any

import pytest

from dapo_megatron.config import RunConfig
from dapo_megatron.errors import ConfigError
from dapo_megatron.launch import check_launch, parent_command, saving_is_cut_short

RESTARTS = {"TORCHELASTIC_MAX_RESTARTS": "3"}


@pytest.mark.parametrize(
    ("environ", "run", "message"),
    [
        ({"SLURM_STEP_NUM_TASKS": "16"}, {}, "srun started 16 tasks"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            {},
            "but LOCAL_RANK, LOCAL_WORLD_SIZE",
        ),
        (RESTARTS, {}, "--max-restarts=3 would start the run again from its first step"),
        (RESTARTS, {"existing": "rename"}, "set run.existing=resume"),
        (RESTARTS, {"existing": "resume", "max_hours": 2.0}, r"run.max_hours\(2\)"),
    ],
)
def test_ranks_that_nobody_started_properly(environ: dict[str, str], run: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_launch(environ, RunConfig(**run))


def test_a_run_that_resumes_may_be_started_again() -> None:
    check_launch({}, RunConfig(max_hours=2.0))
    check_launch(RESTARTS, RunConfig(existing="resume"))


@pytest.mark.parametrize(
    ("environ", "command", "short"),
    [
        ({}, "torchrun -m dapo_megatron.train", 30),
        ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "100"}, "torchrun -m dapo_megatron.train", 100),
        ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "130"}, "torchrun -m dapo_megatron.train", None),
        ({}, "torchrun --shutdown-timeout=130 -m dapo_megatron.train", None),
        ({}, "torchrun --shutdown_timeout 60 -m dapo_megatron.train", 60),
        ({"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT"}, "dapo-megatron train", None),
    ],
)
def test_a_launcher_that_does_not_wait_for_the_save(environ: dict[str, str], command: str, short: int | None) -> None:
    handled = {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT"}
    warning = saving_is_cut_short(handled | environ, command.split(), 120.0)
    if short is None:
        assert warning is None
    else:
        assert warning and f"kills ranks {short} s after" in warning
        assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=130 in" in warning and f"signal_seconds={short - 10} or less" in warning


def test_the_command_of_the_parent_is_known() -> None:
    assert parent_command()
