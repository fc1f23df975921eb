"""From the tensors of a checkpoint to the weights of a bundle: converted, rounded, calibrated, compared."""
