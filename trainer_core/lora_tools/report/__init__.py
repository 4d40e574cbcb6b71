"""The report of a LoRA file: which tool and base model, what is wrong, how much rank it needs; and its repair."""
