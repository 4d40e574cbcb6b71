"""Import a configuration: find its trainer, convert its options by the tables, and report every one of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Problem, UserError, nearest, printable
from ..registry import load, names
from ..spec import Field, NodeSpec, check_value, draft_inputs
from ..workflow.editor.write import editor_workflow
from .full_rank import settle_full_rank
from .option_table import LOAD, NothingToSet, NotThere, Row, Settings, Table, Trainer, Values, Wrong
from .source_files import ConfigFile, SourceFiles, read_config
from .value_readers import is_off, shorten

MARKDOWN = re.compile(r"[\\`*<>\[\]]")  # what Markdown takes for a mark, also within a word
FOLDER = "DatasetBackend"
LOADERS = {"chroma": "LoadChroma", "flux": "LoadFlux"}
RENAMED = {"chroma": {"t5": "text_encoder"}}  # fields of LOAD that one family names differently


@dataclass
class Report:
    """What became of each option, as (its name there, text).

    Args:
        taken: options that set a field.
        equal: options that need no setting here.
        missing: options without an equivalent, and what they would have done.
    """

    taken: list[tuple[str, str]] = field(default_factory=list)
    equal: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)

    def as_json(self) -> dict[str, list[dict[str, str]]]:
        return {
            name: [{"option": option, "text": text} for option, text in lines] for name, lines in vars(self).items()
        }

    def text(self) -> str:
        """Return the three lists as text, with control characters escaped."""
        titles = {"taken": "Taken over", "equal": "Equal without a setting", "missing": "Not there"}
        parts = []
        for name, lines in vars(self).items():
            parts.append(f"{titles[name]} ({len(lines)})")
            parts += [f"  {printable(option)}: {printable(line)}" for option, line in lines] or ["  nothing"]
        return "\n".join(parts)


@dataclass
class Draft:
    """The nodes of the workflow, before they are placed.

    Args:
        family: "chroma" or "flux".
        nodes: node type -> field -> value. LOAD is the loader of the family.
        folders: values of each DatasetBackend.
    """

    family: str
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    folders: list[dict[str, Any]] = field(default_factory=list)

    def type_of(self, node: str) -> str:
        return LOADERS[self.family] if node == LOAD else node

    def name_of(self, node: str, field_name: str) -> str:
        return RENAMED.get(self.family, {}).get(field_name, field_name) if node == LOAD else field_name


@dataclass(frozen=True)
class Imported:
    """A converted configuration: the trainer's name, the workflow for ComfyUI's editor, and the report."""

    trainer: str
    workflow: dict[str, Any]
    report: Report


def import_files(paths: Sequence[Path], catalogue: Mapping[str, NodeSpec]) -> Imported:
    """Convert the configuration in these files.

    Args:
        paths: the main file, and files that it names, in any order.
        catalogue: the nodes by type.
    Raises:
        UserError: a file can't be read, no trainer is recognized, or values are invalid; all problems are listed.
    """
    files = SourceFiles([read_config(path) for path in paths])
    return import_source(files, *detect(files.files), catalogue)


def import_source(
    files: SourceFiles, trainer: Trainer, main: ConfigFile, catalogue: Mapping[str, NodeSpec]
) -> Imported:
    """Convert a configuration whose files have been read.

    Args:
        files: its files.
        trainer: the trainer whose configuration it is.
        main: the main file.
        catalogue: the nodes by type.
    Raises:
        UserError: a file is missing or does not belong to it, or values are invalid; all problems are listed.
    """
    files.used.add(main.path)
    try:
        settings = trainer.read(main, files)
    except Wrong as reason:
        raise UserError.at(str(main.path), f"{reason}, but an option of {trainer.title} wants one") from reason
    if files.absent:
        raise UserError(files.absent)
    unused = [file.path for file in files.files if file.path not in files.used]
    if unused:
        message = f"is not part of the {trainer.title} configuration in {main.path.name}; leave it out"
        raise UserError(Problem(str(path), message) for path in unused)
    draft, report = convert(settings, trainer, catalogue, main.path.name)
    return Imported(
        trainer.title, editor_workflow(draft.nodes, draft.folders, catalogue, _note(trainer, report)), report
    )


def detect(files: Sequence[ConfigFile]) -> tuple[Trainer, ConfigFile]:
    """Return the trainer, and the main file of its configuration.

    Raises:
        UserError: no file is one.
    """
    if match := recognize(files):
        return match
    trainers: list[Trainer] = [load("importer", name) for name in names("importer")]
    titles = ", ".join(dict.fromkeys(trainer.title for trainer in trainers))
    message = f"is not a configuration of a trainer that can be imported ({titles}); give its main file first"
    raise UserError.at(str(files[0].path), message)


def recognize(files: Sequence[ConfigFile]) -> tuple[Trainer, ConfigFile] | None:
    """Return the trainer and the main file of its configuration, None if no file is one."""
    for name in names("importer"):
        trainer: Trainer = load("importer", name)
        for file in files:
            if trainer.detect(file.value):
                return trainer, file
    return None


def convert(
    settings: Settings, trainer: Trainer, catalogue: Mapping[str, NodeSpec], where: str
) -> tuple[Draft, Report]:
    """Return the nodes of a configuration, and the report.

    Raises:
        UserError: values are invalid; all of them are listed.
    """
    draft, problems = Draft(settings.family, {LOAD: {}, "LoRATrainer": {}}), []
    report = Report([], list(settings.equal), list(settings.missing))
    converter = Converter(draft, report, problems, catalogue, where)
    converter.apply(trainer.table, settings.options, "")
    for folder in settings.folders:
        draft.folders.append({})
        converter.apply(trainer.folders, folder.options, f"{folder.label}.")
    if not draft.folders:
        message = "names no folder of images that can be trained on; add one, or give the file of its datasets as well"
        problems.append(Problem(where, message))
    problems += settle(draft, report, catalogue)
    if problems:
        raise UserError(problems)
    return draft, report


@dataclass
class Converter:
    """Applies tables to options.

    Args:
        draft: receives the values.
        report: receives a line for each option.
        problems: receives values that can't be read.
        catalogue: the nodes by type.
        where: name of the main file, for problems.
    """

    draft: Draft
    report: Report
    problems: list[Problem]
    catalogue: Mapping[str, NodeSpec]
    where: str

    def apply(self, table: Table, options: Mapping[str, Any], prefix: str) -> None:
        """Convert all options of a section; the report has a line for each."""
        remaining = dict(options)
        unset = {name: value for name, value in table.defaults.items() if options.get(name) is None}
        complete = {**options, **unset}
        for row in table.rows:
            given = [name for name in row.names if options.get(name) is not None]
            present = [name for name in row.names if name in options or (name in unset and not given)]
            for i, name in enumerate(sorted(present, key=lambda name: complete[name] is None)):
                remaining.pop(name, None)
                if i:
                    self.report.equal.append((prefix + name, f"{row.names[0]} is set as well, and counts"))
                else:
                    self._apply_row(row, name, complete, prefix, name in unset)
        for name, value in remaining.items():
            self._explain(table, name, value, prefix)

    def _apply_row(self, row: Row, name: str, options: Mapping[str, Any], prefix: str, is_default: bool) -> None:
        value, option = options[name], prefix + name
        shown = f"{shorten(value)}{' (its default)' if is_default else ''}"
        try:
            if value is None:
                raise NothingToSet("not set")
            result = row.convert(value, options)
            values = result if isinstance(result, Values) else Values({row.field: result})
            for field_name, here in values.fields.items():
                self._set(row.node, field_name, here, option, shown, values.note)
        except NothingToSet as reason:
            self.report.equal.append((option, f"{shown}: {reason}"))
        except NotThere as reason:
            self.report.missing.append((option, f"{shown}: {reason}"))
        except Wrong as reason:
            self.problems.append(Problem(f"{self.where}: {option}", str(reason)))

    def _set(self, node: str, field_name: str, value: Any, option: str, shown: str, note: str) -> None:
        kind, field_name = self.draft.type_of(node), self.draft.name_of(node, field_name)
        fields = {item.name: item for item in self.catalogue[kind].fields()}
        if field_name not in fields:
            raise NothingToSet(f"{kind} has no {field_name}: this model family does not use it")
        cleaned, fault = _fit(fields[field_name], value)
        target = self.draft.folders[-1] if node == FOLDER else self.draft.nodes.setdefault(node, {})
        if node != FOLDER and self.draft.folders and target.get(field_name, cleaned) != cleaned:
            raise NotThere(f"{kind}.{field_name} is {target[field_name]!r} for all folders, from an earlier one")
        target[field_name] = cleaned
        note = "; ".join(filter(None, (note, fault)))
        line = f"{shown} -> {kind}.{field_name} {shorten(cleaned)}{f' ({note})' if note else ''}"
        (self.report.missing if fault else self.report.taken).append((option, line))

    def _explain(self, table: Table, name: str, value: Any, prefix: str) -> None:
        """Add the line of an option that sets no field."""
        option, shown = prefix + name, shorten(value)
        is_unused = is_off(value)
        if name in table.usual and str(value).lower() != str(table.usual[name]).lower() and not is_unused:
            self.report.missing.append((option, f"{shown}: not there; it is {table.usual[name]} here"))
        elif reason := table.equal.get(name):
            self.report.equal.append((option, f"{shown}: {reason}"))
        elif not is_unused and (reason := table.missing.get(name)):
            self.report.missing.append((option, f"{shown}: {reason}"))
        elif reason := _lookup(table.equal, name):
            self.report.equal.append((option, f"{shown}: {reason}"))
        elif is_unused:
            self.report.equal.append((option, f"{shown}: off, as here"))
        elif reason := _lookup(table.missing, name):
            self.report.missing.append((option, f"{shown}: {reason}"))
        else:
            known = tuple(name for row in table.rows for name in row.names)
            text = f"{shown}: unknown to the import{nearest(name, known, 0.8)}"
            self.report.missing.append((option, text))


def _lookup(reasons: Mapping[str, str], name: str) -> str:
    """Return the reason of the first prefix that the name has, "" if none."""
    return next((text for key, text in reasons.items() if key.endswith("*") and name.startswith(key[:-1])), "")


def _fit(item: Field, value: Any) -> tuple[Any, str]:
    """Return a value that the field accepts, and what was changed ("" if nothing).

    Raises:
        Wrong: the field can't take it.
    """
    cleaned, problem = check_value(item, value)
    if problem is None:
        return cleaned, ""
    if item.range is None or isinstance(value, bool) or not isinstance(value, (int, float)) or cleaned != value:
        raise Wrong(problem.message)
    return item.kind(min(max(cleaned, item.range.low), item.range.high)), problem.message


def settle(draft: Draft, report: Report, catalogue: Mapping[str, NodeSpec]) -> Iterator[Problem]:
    """Make the values of each node fit together, then return the problems that remain."""
    for rule in (settle_full_rank, _settle_steps, _settle_memory, _settle_folders, _settle_validation):
        rule(draft, report)
    draft.nodes[draft.type_of(LOAD)] = draft.nodes.pop(LOAD)
    for kind, values in (*draft.nodes.items(), *((FOLDER, values) for values in draft.folders)):
        spec = catalogue[kind]
        sockets = {item.name: None for item in spec.fields() if item.socket and item.required}
        for problem in draft_inputs(spec, {**sockets, **values}).problems:
            yield problem.at("", kind)


def _settle_steps(draft: Draft, report: Report) -> None:
    training = draft.nodes["LoRATrainer"]
    if training.get("epochs") and "steps" not in training:
        training["steps"] = 0
    elif training.get("epochs") and training.get("steps"):
        training["epochs"] = 0
        report.missing.append(("epochs", f"the {training['steps']} steps count; set steps to 0 to train by epochs"))
    elif training.get("steps") == 0 and not training.get("epochs"):
        training.pop("steps")


def _settle_memory(draft: Draft, report: Report) -> None:
    memory = draft.nodes.get("MemorySettings")
    if memory is None:
        return
    offload = memory.get("group_offload", "none") != "none"
    if not offload:
        for name in ("offload_stream", "offload_to_disk", "offload_share", "blocks_per_group"):
            memory.pop(name, None)
    moves = offload or memory.get("activation_offload")
    if moves and memory.pop("compile", False):
        report.missing.append(("compile", "not used: blocks whose tensors are moved can't be compiled"))
    if offload and memory.pop("model_offload", False):
        report.equal.append(("model_offload", "group_offload moves the model already"))
    if memory.get("offload_stream") and memory.pop("offload_to_disk", False):
        report.missing.append(("offload_to_disk", "not used: offload_stream needs the weights in RAM"))
    if memory.get("group_offload") == "leaf":
        memory.pop("blocks_per_group", None)
    manual = moves or memory.get("checkpointing_interval", 1) > 1
    memory["mode"] = "manual" if manual else "auto"


def _settle_folders(draft: Draft, report: Report) -> None:
    for values in draft.folders:
        if values.get("tag_orders", 0) < 2 and not values.get("tag_dropout") and values.pop("kept_tags", 0):
            report.equal.append(("kept tags", "no tags are shuffled"))
        if not values.get("masks", "").strip() and values.pop("unmasked_weight", 0):
            report.equal.append(("weight of unmasked areas", "there are no masks"))
        is_cropped_to = values.get("crop_aspect") in ("closest", "random")
        if is_cropped_to and not values.get("crop", True):
            values.pop("aspects", None)
            report.equal.append((f"crop to the {values.pop('crop_aspect')} aspect ratio", "crop is off"))
        if values.get("captions") != "table":
            for name in ("caption_column", "file_column", "table"):
                if values.pop(name, None):
                    report.equal.append((name, "captions are not read from a table"))
        if values.get("class_word") and not values.get("trigger", "").strip():
            values.pop("class_word")
            report.missing.append(("class word", "there is no trigger; the prediction for the empty caption is held"))
        if values.get("captions") == "instance prompt" and not values.get("instance_prompt", "").strip(" |"):
            values.pop("captions")
            report.missing.append(("instance prompt", "is empty; captions are read from text files"))
        if values.get("degrade", "").strip() and values.get("references", "").strip():
            values.pop("degrade")
            report.missing.append(("degradation", "not used: the folder has reference images"))


def _settle_validation(draft: Draft, report: Report) -> None:
    validation = draft.nodes.get("ValidateSampler")
    if validation is not None and not validation.get("prompts", "").strip():
        del draft.nodes["ValidateSampler"]
        report.missing.append(("validation", "has no prompts, so no validation images are sampled"))


def _note(trainer: Trainer, report: Report) -> str:
    """Return the text of the workflow's note: what needs a look."""
    lines = [f"- **{_literal(option)}**: {printable(text)[:300]}" for option, text in report.missing[:40]]
    more = f"\n- and {len(report.missing) - 40} more" if len(report.missing) > 40 else ""
    body = "\n".join(lines) + more if lines else "Nothing is missing."
    return f"## Imported from {trainer.title}\n\n**{len(report.taken)} settings taken over.** Not there:\n\n{body}\n"


def _literal(option: str) -> str:
    """Return the name of an option for Markdown. Not as inline code: Nodes 2.0 draw it in blue on a note's brown."""
    return MARKDOWN.sub(r"\\\g<0>", printable(option)[:80])
