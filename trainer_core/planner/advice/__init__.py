"""What makes a request fit that does not, besides the changes of auto_tune.py."""
