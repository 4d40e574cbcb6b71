"""Start the processes of a run on several devices or in the background, and show what they report (docs/devices.md)."""
