from __future__ import annotations

import pytest

from dapo_megatron.config import Config
from dapo_megatron.config_file import parse
from dapo_megatron.errors import ConfigError
from dapo_megatron.rollout.transport import check_transport


def config(transport: str, placement: str) -> Config:
    engine = {"placement": placement, **({"urls": ["http://h:80"]} if placement == "external" else {})}
    return parse(
        {"model": {"path": "m"}, "data": {"train": "t"}, "engine": engine, "weights": {"transport": transport}}
    )


@pytest.mark.parametrize(
    ("gpus", "transport", "placement", "ranks", "says"),
    [
        (0, "nccl", "split", (1, 1), "transport=nccl moves weights between memories of GPUs, and torch sees no GPU"),
        (0, "ipc", "colocated", (1, 1), "transport=ipc moves .* set weights.transport=gloo"),
        (2, "nccl", "colocated", (1, 1), "NCCL refuses two members of a group on one GPU; set weights.transport=ipc"),
        (2, "ipc", "split", (1, 1), "a rank and an engine share, but engine.placement is split; set .*=nccl"),
        (2, "ipc", "external", (1, 1), "but engine.placement is external"),
        (2, "ipc", "colocated", (0, 0), "but `dapo-megatron engines` trains nothing"),
        (2, "ipc", "colocated", (4, 2), "within one machine, but of 4 ranks 2 are on this one; set .*=gloo"),
    ],
)
def test_what_cannot_be_is_refused(
    gpus: int, transport: str, placement: str, ranks: tuple[int, int], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=says):
        check_transport(config(transport, placement), *ranks)


@pytest.mark.parametrize(
    ("gpus", "transport", "placement", "ranks"),
    [
        (0, "gloo", "split", (1, 1)),
        (2, "gloo", "colocated", (4, 2)),
        (0, "disk", "external", (1, 1)),
        (2, "nccl", "split", (4, 1)),
        (2, "nccl", "external", (1, 1)),
        (2, "nccl", "split", (0, 0)),
        (2, "ipc", "colocated", (2, 2)),
    ],
)
def test_what_can_be_is_not(
    gpus: int, transport: str, placement: str, ranks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    check_transport(config(transport, placement), *ranks)
