"""From a PyTorch checkpoint to a bundle: checkpoint, network, graph, weights. Needs torch."""
