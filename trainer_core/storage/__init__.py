"""Files and tensors on disk: atomic writes, tensor stores, digests."""
