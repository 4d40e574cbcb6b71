"""Publish a LoRA on the Hugging Face Hub: the file, its model card, sample images and the workflow, in one commit.

The token is huggingface_hub's own: of `hf auth login`, or HF_TOKEN. It is no setting, and is written nowhere.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.serialize import to_record
from ..config.validation import ValidationConfig
from ..errors import Problem, UserError, quoted, reason_of
from ..host import Host, Notice
from ..runs import layout
from ..runs.control import runs_in
from ..storage.atomic import sha256_of, write_atomic
from ..storage.bounded_files import Unusable, read_json
from .model_card import HUB_ID, MARK, Facts, Sample, card_of, facts_of

CARD, WORKFLOW = "README.md", "workflow.json"
GRID = re.compile(r"(?P<label>.*?)-?step-(?P<step>\d{6,})-\d+x\d+\.png")
MAX_SAMPLES = 12
REPORT_BYTES = 64 << 20
MAX_PROMPT = 1000  # characters of the text under a sample


@dataclass(frozen=True)
class Published:
    """What was published.

    Attributes:
        url: address of the repository.
        commit: hash of the commit.
    """

    url: str
    commit: str


def publish(lora: Path, repo: str, private: bool, host: Host, base: str = "") -> Published:
    """Publish a LoRA. May be repeated: what the Hub already has is not sent again.

    Args:
        lora: the LoRA file.
        repo: Hub id, such as "user/name". The repository is created if it does not exist.
        private: create it as a private one.
        base: Hub id of the base model; "" uses what the LoRA records.
    Raises:
        UserError: a wrong id, no login, a repository that is public where a private one is asked for, or the Hub
            refuses or can't be reached.
    """
    if problems := repo_problems(repo, base):
        raise UserError(problems)
    facts = gather(lora, host, base)
    files = files_of(facts, lora)
    return _upload(
        files, repo.strip(), private, host, f"{facts.title}, step {facts.steps}" if facts.steps else facts.title
    )


def write_locally(lora: Path, target: Path, host: Host, base: str = "") -> list[str]:
    """Write what would be published into an empty folder, and return the names of the files.

    Raises:
        UserError: the folder has files in it.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError.at("--dry-run", f"{quoted(target)} exists and is not an empty folder; use another one")
    files = files_of(gather(lora, host, base), lora)
    for name, content in files.items():
        write_atomic(target / name, content.read_bytes() if isinstance(content, Path) else content)
    return sorted(files)


def repo_problems(repo: str, base: str = "") -> list[Problem]:
    """Return the problems that can be found without a network: a wrong id, or no login."""
    from huggingface_hub import get_token

    problems = [
        Problem(name, f"{text[:80]!r} is not the id of a repository; write user/name, with letters, digits, - _ and .")
        for name, text in (("repo", repo.strip()), ("base_model", base))
        if (text or name == "repo") and not HUB_ID.fullmatch(text)
    ]
    if not problems and not get_token():
        text = "you are not logged in to the Hugging Face Hub; run hf auth login, or set HF_TOKEN in the environment"
        problems.append(Problem("repo", text))
    return problems


def gather(lora: Path, host: Host, base: str = "") -> Facts:
    """Return what is known of a LoRA, with the sample images of its run."""
    folder, step = run_of(lora, host.paths.output)
    facts = facts_of(lora, base)
    samples = samples_of(folder, step, facts) if folder else []
    if not samples:
        host.emit(
            Notice(f"no sample images of {lora.name}; they come from the run's folder in the output folder", "warning")
        )
    if not facts.base:
        text = f"the base model of {lora.name} is not on the Hub, or unknown; name it with --base-model user/name"
        host.emit(Notice(text, "warning"))
    return replace(facts, samples=samples)


def run_of(lora: Path, output: Path) -> tuple[Path | None, int | None]:
    """Return the folder of the run that saved a LoRA, by its digest, and the step of the LoRA if it is the best one's."""
    digest = sha256_of(lora)
    for folder in runs_in(output):
        try:
            report = read_json(folder / layout.REPORT, REPORT_BYTES)
        except (OSError, Unusable):
            continue
        best = report.get("best") if isinstance(report, dict) else None
        if isinstance(best, dict) and best.get("sha256") == digest and isinstance(best.get("step"), int):
            return folder, best["step"]
        if isinstance(report, dict) and report.get("sha256") == digest:
            return folder, None
    return None, None


def samples_of(folder: Path, step: int | None, facts: Facts) -> list[Sample]:
    """Return the validation images of a step: those of a prompt library by name, else the grids.

    Args:
        step: step of the LoRA; None, or a step without images: the last one with images.
    """
    prompts = _prompts(facts)
    named = _of_step(folder / layout.VALIDATION / layout.BY_NAME, step)
    grids = _of_step(folder / layout.VALIDATION, step)
    samples = [Sample(path, prompts.get(match["label"], match["label"])) for path, match in named]
    joined = " | ".join(prompts.values())[:MAX_PROMPT] or facts.title
    return (samples or [Sample(path, joined) for path, _ in grids])[:MAX_SAMPLES]


def _of_step(folder: Path, step: int | None) -> list[tuple[Path, re.Match[str]]]:
    matches = [(path, match) for path in sorted(folder.glob("*.png")) if (match := GRID.fullmatch(path.name))]
    steps = {int(match["step"]) for _, match in matches}
    chosen = step if step in steps else max(steps, default=0)
    return [(path, match) for path, match in matches if int(match["step"]) == chosen]


def _prompts(facts: Facts) -> dict[str, str]:
    """Return the recorded prompts of the validation images by their names in files."""
    from ..validation.sample_images import file_names

    recorded = facts.request.get("validation")
    known = to_record(ValidationConfig())
    values = {name: value for name, value in recorded.items() if name in known} if isinstance(recorded, dict) else {}
    try:
        library = ValidationConfig(**values).library()
    except (UserError, TypeError, AttributeError):
        return {}
    names = file_names(list(library))
    return {names[label]: prompt for label, prompt in library.items()}


def files_of(facts: Facts, lora: Path) -> dict[str, Path | bytes]:
    """Return the files of the repository: path there -> a file, or its content."""
    files: dict[str, Path | bytes] = {facts.file: lora, CARD: card_of(facts).encode("utf-8", "backslashreplace")}
    if facts.workflow:
        files[WORKFLOW] = (json.dumps(facts.workflow, indent=2, ensure_ascii=False) + "\n").encode(
            "utf-8", "backslashreplace"
        )
    return files | {sample.target: sample.path for sample in facts.samples}


def _upload(files: dict[str, Path | bytes], repo: str, private: bool, host: Host, title: str) -> Published:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        _refuse_public(api, repo, private)
        url = str(api.create_repo(repo, private=private or None, exist_ok=True))
        if not _owns_card(api, repo):
            files = {name: content for name, content in files.items() if name != CARD}
            host.emit(Notice(f"the {CARD} of {repo} was edited, and stays as it is", "warning"))
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(repo, operations, commit_message=title)
    except HfHubHTTPError as error:
        raise UserError.at("repo", f"{repo}: {_explain(error)}; the LoRA itself is safe, so try again") from error
    except (OfflineModeIsEnabled, OSError, ValueError, RuntimeError) as error:
        text = (
            f"the Hub can't be reached ({reason_of(error)[:200]}); what was sent is not sent again when you repeat it"
        )
        raise UserError.at("repo", f"{repo}: {text}") from error
    return Published(url, str(commit.oid))


def _refuse_public(api: Any, repo: str, private: bool) -> None:
    """Refuse to publish in a public repository where a private one is asked for."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        about = api.repo_info(repo)
    except RepositoryNotFoundError:
        return
    if private and about.private is False:
        raise UserError.at("repo", f"{repo} exists and is public, and a private one is asked for; use another name")


def _owns_card(api: Any, repo: str) -> bool:
    """Return whether the repository's card is ours: there is none, or it has our mark."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return MARK in Path(api.hf_hub_download(repo, CARD)).read_text("utf-8", "replace")
    except EntryNotFoundError:
        return True


def _explain(error: Any) -> str:
    status = getattr(error.response, "status_code", 0)
    reasons: dict[int, str] = {
        401: "the Hub does not accept the token; run hf auth login again, or set HF_TOKEN to a token with write access",
        403: "the token has no write access to it; use one that has, or another repository",
        404: "it does not exist, or the token can't see it",
        429: "the Hub asks to wait; too many requests",
    }
    return reasons.get(status, f"the Hub answered with HTTP status {status}")
