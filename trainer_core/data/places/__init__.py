"""Where images come from beside a local folder: archives, object stores, the Hugging Face Hub, tables of addresses."""
