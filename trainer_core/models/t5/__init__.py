"""T5: text encoder and tokenizer."""
