"""Finding, reading and fingerprinting the files of weights."""
