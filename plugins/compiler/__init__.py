"""From Triton functions to code for every board, without a GPU."""
