"""Keeps the ranks of a run in touch beside their collectives: who has come how far, who failed, who is gone.

A collective knows none of that: it waits, for a rank that samples for hours as for one that was killed. So the leader
(rank 0) listens, every other rank keeps one connection to it, and a thread at either end sends a beat, whatever the
main thread does. What crosses is JSON, one object a line:

    {"token": "5c1f...", "rank": 5, "host": "node7"}    the first line, from the rank that connects
    {"beat": "rollout, at ..."}                         either way: I live, and this is where my main thread is
    {"at": "weights"}                                   to the leader, from a rank that has come to this `together`
    {"go": "rollout", "value": null}                    from the leader: it has come to this call of `after_leader` or
                                                        `leader_says`, with this value, or all ranks to this `together`
    {"stop": "SIGTERM"}                                 to the leader: this rank was asked to end
    {"failed": "error: ...", "code": 1, "late": false}  to the leader, which answers with `end`
    {"end": 1}                                          from the leader, which says why: leave with this exit code
    {"letter": {...}}                                   either way: for whoever reads `Peers.letters`
    {"bye": true}                                       either way: I am done, and my connection will end

A letter may be secret: unlike torchrun's store, which answers whoever reaches its port, this connection has two ends,
and the leader takes no other once all ranks are there. Nothing is encrypted.
"""

from __future__ import annotations

from collections.abc import Callable

from dapo_megatron.heartbeat.follower import Follower
from dapo_megatron.heartbeat.leader import Leader
from dapo_megatron.heartbeat.peers import SETTLE_SECONDS, Failure, Peers, Store

__all__ = ["SETTLE_SECONDS", "Failure", "Peers", "Store", "join"]


def join(
    store: Store,
    rank: int,
    world_size: int,
    on_failure: Callable[[Failure], None],
    on_stop: Callable[[str, str], None],
    *,
    address: str | None,
    lost_seconds: float,
    join_seconds: float,
    port: int | None = None,
) -> Peers:
    """Connect the ranks. Returns when this rank is connected; on the leader, when all are.

    Args:
        store: has the same content on every rank. It takes the place and the token of this connection.
        on_failure: called once, in a thread of its own, when another rank failed or is lost, or the leader says to
            leave. On the leader the reason names the rank; elsewhere it is empty unless the leader is lost.
        on_stop: called on the leader, in a thread of its own, when another rank was asked to end: the names of
            the signal and of the rank.
        address: under which this machine knows the leader's; None where all ranks are on this machine.
        lost_seconds: without a beat after which a rank counts as lost.
        join_seconds: limit on this call.
        port: where the leader listens; None for any free port.

    Raises:
        ConfigError: where the leader cannot listen on `port`.
        DapoError: where not all ranks come in time.
    """
    if world_size == 1:
        return Peers()
    if rank == 0:
        return Leader(store, world_size, on_failure, on_stop, address, lost_seconds, join_seconds, port or 0)
    return Follower(store, rank, on_failure, address, lost_seconds, join_seconds)
