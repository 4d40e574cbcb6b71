"""What is known of each image beside its pixels: a table with a row for each, or a file beside it."""
