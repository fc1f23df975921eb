"""From a PyTorch checkpoint to a bundle: checkpoint, network, graph, weights. Needs torch."""

from flexattention_deploy import require_extra, require_own

require_own("runtime", "engines", "plugins")
require_extra("export")
