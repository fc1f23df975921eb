"""A bundle behind HTTP on many machines, by Ray Serve: `serve run runtime.serve.ray:deployment BUNDLE=build/NAME`, or a
config file such as examples/serve.yaml with `serve deploy`. docs/scaling.md tells when, and what of it to set."""

from flexattention_deploy import require_extra

require_extra("ray")

from runtime.serve.ray.cluster import Cluster, deployment  # noqa: E402 - only now it is known to be there

__all__ = ["Cluster", "deployment"]
