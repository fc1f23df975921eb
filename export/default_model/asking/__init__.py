"""How the default model is asked: patterns, names, words unknown on purpose, their tokenizer, and who asks."""
