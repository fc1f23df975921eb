"""Which replica answers: for a question about an image the one that has it encoded, as long as it is not full."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

_Replica = TypeVar("_Replica")


class ImageRouter(RequestRouter):  # type: ignore[misc]  # Ray's classes are Any
    """Rendezvous hashing: every image has an order of the replicas of its own, and goes to the first of them that is
    not full; its overflow, too, finds the image again. All routers agree without talking to each other, and a replica
    that comes or goes moves no images but its own. A question without an image goes to the less busy of two.

    Without FIFOMixin of Ray: it would give the replica that was chosen for one request to another.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas: the first that holds one with room wins, there the least busy one. The request's first
        argument is its image's key (see runtime.serve.ray.front), empty without an image."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # when all are full; it would ask again without a pause
        key = pending_request.args[0]
        if not key:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas))), candidate_replicas]
        return [[replica] for replica in ranked(key, candidate_replicas, [_name(each) for each in candidate_replicas])]


def ranked(key: str, replicas: Sequence[_Replica], names: Sequence[str]) -> list[_Replica]:
    """The replicas in the order in which they are asked for `key`. names: of each, the same in every process."""
    weights = [hashlib.blake2b(f"{name}\0{key}".encode(), digest_size=8).digest() for name in names]
    return [replicas[index] for index in sorted(range(len(replicas)), key=weights.__getitem__)]


def _name(replica: RunningReplica) -> str:
    return str(replica.replica_id.unique_id)
