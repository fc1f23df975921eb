"""Which replica answers: for a question about an image the one that has it encoded, as long as it is not full."""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, TypeVar

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

_Replica = TypeVar("_Replica")


class ImageRouter(RequestRouter):  # type: ignore[misc]  # Ray's classes are Any
    """An image's questions go to the replica that had the last of them. A new image goes to the less busy of two, which
    its hash says (rendezvous hashing): several routers, which do not talk to each other, look for it at the same two,
    and a replica that comes or goes moves few images but its own. A known image, too, goes to the less busy one when
    its own replica holds `spill` requests more. What these have no room for, the others take in the order of the hash.
    A question without an image goes to the less busy of any two.

    So an image that many ask about at once is spread, but a fleet that is busy everywhere does not begin to encode
    images again, which would make it busier still.

    Without FIFOMixin of Ray: it would give the replica that was chosen for one request to another.
    """

    REMEMBERED = 100_000  # images: some 20 MB, and more than all replicas keep

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As Ray calls it."""
        super().__init__(*args, **kwargs)
        self._spill = 0
        self._last = OrderedDict[str, ReplicaID]()  # by image, the latest at its end

    def initialize_state(self, *, spill: int) -> None:
        """Ray hands over what the deployment's `request_router_kwargs` say."""
        self._spill = spill

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
        order = ranked(key, candidate_replicas, [str(each.replica_id.unique_id) for each in candidate_replicas])
        last = self._last.get(key)
        own = [each for each in order if each.replica_id == last]
        if own and self._held(own[0]) - min(map(self._held, order[:2])) >= self._spill:
            own = []
        return [own, order[:2], *([each] for each in order[2:])]

    def _held(self, replica: RunningReplica) -> int:
        """Requests that a replica holds, as far as this router knows."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """Ray says who took a request."""
        if key := pending_request.args[0]:
            self._last[key] = replica_id
            self._last.move_to_end(key)
            if len(self._last) > self.REMEMBERED:
                self._last.popitem(last=False)


def ranked(key: str, replicas: Sequence[_Replica], names: Sequence[str]) -> list[_Replica]:
    """The replicas in the order in which they are asked for `key`. names: of each, the same in every process."""
    weights = [hashlib.blake2b(f"{name}\0{key}".encode(), digest_size=8).digest() for name in names]
    return [replicas[index] for index in sorted(range(len(replicas)), key=weights.__getitem__)]
