"""Keep the ranks of a run equal: start them from the same weights, and compare the weights while they train."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load, save

from ...adapters.inject import adapter_state, live_state, load_adapter_state_
from ...distributed.ranks import Ranks
from ...errors import UserError
from ...host import Host
from ...runs.layout import CHECKPOINT_MANIFEST, list_checkpoints
from ...runs.rank_host import PeerHost, show_warnings
from ...runs.run_host import RunHost
from ..step.state import Hook, TrainState

EVERY = 50  # steps between two comparisons


@contextmanager
def checkpoint_for(
    ranks: Ranks, find: Callable[[], Path | None], reads_in_place: bool = False
) -> Iterator[Path | None]:
    """Yield the checkpoint that rank 0 resumes from, as a folder that this rank can read; None where there is none.

    Other ranks get a copy, which is deleted at the end.

    Args:
        find: looks for it, on rank 0 alone.
        reads_in_place: no copies where all ranks see the folder of rank 0: for a whole model.
    """
    if ranks.size == 1:
        yield find()
        return
    paths: list[Path] = []

    def find_files() -> list[str]:
        path = find()
        paths.extend([path] if path else [])
        return [str(path), *sorted(file.name for file in path.iterdir())] if path else []

    files = ranks.from_main(find_files)
    if not files:
        yield None
        return
    if reads_in_place and _all_see(ranks, Path(files[0])):
        yield Path(files[0])
        return
    with tempfile.TemporaryDirectory(prefix="chroma-trainer-") as temporary:
        folder = Path(temporary) / Path(files[0].replace("\\", "/")).name
        folder.mkdir()
        for name in files[1:]:
            content = ranks.bytes_from_main(lambda name=name: (paths[0] / name).read_bytes())
            if not ranks.is_main:
                (folder / name).write_bytes(content)
        yield paths[0] if ranks.is_main else folder


def _all_see(ranks: Ranks, checkpoint: Path) -> bool:
    """Return whether each rank finds this checkpoint, with the same hashes, at its own path of this name."""

    def manifest() -> str:
        try:
            return (checkpoint / CHECKPOINT_MANIFEST).read_text("utf-8")
        except (OSError, ValueError):
            return ""

    texts = ranks.together(manifest)
    return bool(texts[0]) and len(set(texts)) == 1


def share_start_(state: TrainState) -> None:
    """Let every rank start from the weights of rank 0. A random start is equal anyway, a computed one may not be.

    Kind full starts from the model's file, which the ranks have compared.
    """
    if state.ranks.size == 1 or state.is_full:
        return
    weights = state.ranks.bytes_from_main(lambda: save(adapter_state(state.layers)))
    if state.ranks.is_main:
        return
    load_adapter_state_(state.layers, load(weights))
    if state.ema is not None:
        state.ema.begin_(state.layers)


def compare_hook(checkpoints: Path, host: Host) -> Hook:
    """Return a hook that compares the ranks' weights every 50 steps, and shows what other ranks have warned of."""

    def compare(state: TrainState) -> None:
        if state.ranks.size == 1:
            return
        if not isinstance(host, PeerHost):
            assert isinstance(host, RunHost)
            show_warnings(host, state.ranks)
        if state.step % EVERY == 0:
            require_same_weights(state, checkpoints)

    return compare


def require_same_weights(state: TrainState, checkpoints: Path) -> None:
    """Compare the trained weights of all ranks, bit by bit.

    Raises:
        UserError: they differ, as after an error of a device's memory. The state is marked as inconsistent, so that it
            is never saved.
    """
    if state.ranks.size == 1 or state.sharding is not None:  # each has other rows
        return
    digests = state.ranks.together(lambda: _digest(state))
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if not others:
        return
    state.is_consistent = False
    names = ", ".join(state.ranks.name_of(rank) for rank in others)
    steps = [path.name for path in list_checkpoints(checkpoints)[-1:]]
    intact = f"The last checkpoint, {steps[0]}, is intact" if steps else "There is no checkpoint yet"
    raise UserError.at(
        "devices",
        f"after step {state.step} the weights of {names} differ from those of {state.ranks.name_of(0)}, which should "
        "be equal bit by bit. A device computes wrongly, as with faulty memory or too much overclocking. "
        f"{intact}; run again to resume, without that device if it happens again",
    )


def _digest(state: TrainState) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(live_state(state.layers).items()):
        digest.update(name.encode())
        digest.update(save({"": tensor}))
    return digest.hexdigest()
