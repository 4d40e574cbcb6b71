"""Reading datasets: folders, files, captions, and what is wrong with them."""
