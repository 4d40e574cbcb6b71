"""Start the processes of a run on several devices, show what they report, and end with their result (docs/devices.md)."""
