"""Text in, token ids out, and back: a bundle's template and tokenizer, and the text of a running answer."""
