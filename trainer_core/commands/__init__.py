"""The commands of chroma-trainer for workflows and runs. Those of other rooms stand there, in files named *_command.py."""
