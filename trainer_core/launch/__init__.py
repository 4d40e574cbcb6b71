"""Start the processes of a run on several devices, and show what they report (docs/devices.md)."""
