"""The default model: a few megabytes of FlexAttention that read small numbers in pictures of coloured shapes."""
