"""The command `chroma-trainer publish`. Heavy modules are imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console import Console, print_text
from ..host import SinkHost
from ..paths import local_paths


def add_publish(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("lora", help="LoRA file (.safetensors), or its name in the output folder's loras")
    parser.add_argument("--repo", metavar="USER/NAME", help="Hugging Face repository; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="a repository that only you can see")
    parser.add_argument("--dry-run", metavar="DIR", help="write the files into an empty folder, and send nothing")
    parser.add_argument("--base-model", metavar="USER/NAME", help="repository of the base model (default: as recorded)")
    parser.add_argument("--output", metavar="DIR", help="output folder with the LoRA's run (default: output)")


def publish_lora(arguments: argparse.Namespace) -> int:
    """Publish a LoRA on the Hugging Face Hub: with a model card, sample images and its workflow."""
    from ..runs.saved_loras import find_lora
    from .publish import publish, write_locally

    output, base = Path(arguments.output or "output"), (arguments.base_model or "").strip()
    lora = find_lora(arguments.lora, output)
    host = SinkHost(paths=local_paths([], output), sinks=(Console(),))
    if arguments.dry_run:
        names = write_locally(lora, Path(arguments.dry_run), host, base)
        print_text("\n".join([f"written to {arguments.dry_run}, nothing was sent:", *(f"  {name}" for name in names)]))
        return 0
    result = publish(lora, arguments.repo or "", arguments.private, host, base)
    print_text(f"published: {result.url} (commit {result.commit[:8]})")
    return 0
