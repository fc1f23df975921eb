"""The default model: a few megabytes of FlexAttention that read small numbers in pictures of coloured shapes."""

from flexattention_deploy import require_extra

require_extra("train")
