"""HTTP routes of the page for files and images, and what they share."""
