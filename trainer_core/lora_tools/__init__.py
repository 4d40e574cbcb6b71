"""Tools for finished LoRAs: report, repair, merge, resize, extract, and training again from a file's own record."""
