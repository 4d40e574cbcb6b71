"""The command `chroma-trainer doctor`, for LoRAs and for datasets."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..command_line.arguments import add_folder_arguments
from ..command_line.command_host import make_host
from ..command_line.interrupts import Interrupts
from ..console import Console
from ..dataset_doctor import doctor_command
from ..lora_tools import commands as lora_report
from .graph_arguments import read_graph


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    lora_report.add_doctor(parser)
    doctor_command.add_dataset_options(parser)
    add_folder_arguments(parser)


def doctor(arguments: argparse.Namespace) -> int:
    """Report what is wrong with a LoRA file, a folder of images, or the datasets of a workflow."""
    from ..dataset_doctor.subjects import is_source, subject_of_source, subjects_of_workflow

    refuse, is_workflow = doctor_command.refuse_options, Path(arguments.file).suffix.lower() == ".json"
    if not is_source(arguments.file) and not is_workflow:
        refuse(arguments, {**doctor_command.DATASET_OPTIONS, **doctor_command.FOLDER_OPTIONS}, "a LoRA file")
        return lora_report.doctor(arguments)
    refuse(arguments, doctor_command.LORA_OPTIONS, "a dataset")
    catalogue = arguments.trainer().catalogue
    host = make_host(argparse.Namespace(**{**vars(arguments), "output": None}), (Console(),), Interrupts())
    if is_source(arguments.file):
        names = doctor_command.FOLDER_OPTIONS
        fields = {name: value for name in names if (value := getattr(arguments, name)) is not None}
        with subject_of_source(arguments.file, fields, catalogue, host) as (subject, own):
            return doctor_command.examine_subjects(arguments, [subject], own)
    refuse(arguments, doctor_command.FOLDER_OPTIONS, "a workflow")
    graph = read_graph(argparse.Namespace(**{**vars(arguments), "workflow": arguments.file, "set": []}))
    return doctor_command.examine_subjects(arguments, subjects_of_workflow(graph, catalogue, host), host)
