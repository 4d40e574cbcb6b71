"""Several processes that train one LoRA together, with the bytes that one process would write (docs/devices.md)."""
