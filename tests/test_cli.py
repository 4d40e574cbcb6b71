"""The command line: exit codes, reports, what is imported, and workflows carried by the files that a run left."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chroma_trainer.cli import main
from chroma_trainer.trainer_core.command_line.interrupts import Interrupts
from chroma_trainer.trainer_core.storage.atomic import sha256_of
from chroma_trainer.trainer_core.version import VERSION
from PIL import Image

PROJECT = Path(__file__).resolve().parents[1]
HANGS_SECONDS = 300
FOLDERS = ("--models", "models", "--output", "out")


def graph(**training) -> dict:
    """A tiny training with one picture to draw, in the API's form."""
    values = {
        "name": "tiny", "rank": 2, "alpha": 2, "steps": 3, "learning_rate": 0.01, "warmup_steps": 0,
        "gradient_checkpointing": False, "checkpoint_every": 0, "eval_images": 0, **training,
    }  # fmt: skip
    prompts = {"prompts": "a cat", "steps": 1, "cfg": 1.0, "resolutions": "32x32"}
    return {
        "1": {"class_type": "LoadChroma", "inputs": {"folder": "tiny-chroma", "dtype": "fp32"}},
        "3": {"class_type": "DatasetBackend", "inputs": {"folder": "Bilder ü 猫", "resolution": 32, "trigger": "sks"}},
        "4": {"class_type": "ValidateSampler", "inputs": prompts, "_meta": {"title": "What to draw"}},
        "5": {
            "class_type": "LoRATrainer",
            "inputs": {"model": ["1", 0], "dataset": ["3", 0], "validation": ["4", 1], **values},
            "_meta": {"title": "My trainer"},
        },
    }


@pytest.fixture(scope="module")
def home(tiny_chroma: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder: models/diffusers/tiny-chroma, two pictures, workflow.json; `first` is the result of a run there."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_chroma, home / "models" / "diffusers" / "tiny-chroma")
    pictures = home / "Bilder ü 猫"
    pictures.mkdir()
    for name, color in (("größe", (200, 30, 20)), ("猫", (20, 30, 200))):
        Image.new("RGB", (40, 40), color).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(f"a {name}", encoding="utf-8")
    (home / "workflow.json").write_text(json.dumps(graph()), encoding="utf-8")
    return home


@pytest.fixture
def cli(home, monkeypatch):
    """cli("run", ...) in the working folder, with the signals put back afterwards."""
    monkeypatch.chdir(home)
    with signals_kept():
        yield lambda *arguments: main([str(argument) for argument in arguments])


@contextmanager
def signals_kept() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def first(home) -> dict:
    """The report of the first run."""
    with pytest.MonkeyPatch.context() as patch, signals_kept():
        patch.chdir(home)
        assert main(["run", "workflow.json", *FOLDERS, "--report", "report.json"]) == 0
    return json.loads((home / "report.json").read_text("utf-8"))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}


def test_the_report(home, first):
    assert {
        "lora", "sha256", "steps", "loss", "eval_loss", "seconds", "seconds_per_step", "peak_ram_bytes", "total_seconds",
        "dataset", "files",
    } <= first.keys()  # fmt: skip
    assert set(first["seconds"]) == {"start", "text", "latents", "load", "eval", "train", "validate", "save"}
    assert {"before", "after"} <= set(first["eval_loss"]) and first["steps"] == len(first["loss"]) == 3
    lora = Path(first["lora"])
    assert lora == home / "out" / "loras" / "tiny.safetensors" and sha256_of(lora) == first["sha256"]
    for key in ("run", "loss_chart", "crop_sheet"):
        assert Path(first["files"][key]).exists()
    assert first["dataset"]["found"] == first["dataset"]["used"] == 2 and first["dataset"]["triggers"] == ["sks"]
    assert sum(first["seconds"].values()) <= first["total_seconds"]


@pytest.mark.parametrize("carrier", ["lora", pytest.param("grid", marks=pytest.mark.slow)])
def test_a_workflow_in_a_file_of_the_run_gives_the_same_bytes(cli, home, first, carrier):
    path = first["lora"] if carrier == "lora" else first["files"]["validation"][0]
    assert cli("run", path, "--models", "models", "--output", f"out-{carrier}", "--report", f"{carrier}.json") == 0
    assert json.loads((home / f"{carrier}.json").read_text("utf-8"))["sha256"] == first["sha256"]


@pytest.mark.parametrize("node", ["5", "My trainer", "LoRATrainer"])
def test_values_are_set_by_id_title_and_type(cli, home, capsys, node):
    assert cli("check", "workflow.json", *FOLDERS, "--set", f"{node}.rank=0", "--set", f"{node}.steps=abc") == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: node 5 (LoRATrainer).rank: 0 is out of range; use 1 to 512, nearest is 1",
        "error: node 5 (LoRATrainer).steps: 'abc' is not a whole number; use 0 to 1000000",
    ]


def test_a_set_value_is_trained_with(cli, home, first):
    assert (
        cli(
            "run",
            "workflow.json",
            *FOLDERS,
            "--set",
            "LoRATrainer.steps=1",
            "--set",
            "5.name=other",
            "--set",
            "5.eval_images=4",
            "--report",
            "r.json",
        )
        == 0
    )
    report = json.loads((home / "r.json").read_text("utf-8"))
    assert report["steps"] == 1 and report["lora"].endswith("other.safetensors")
    assert report["eval_loss"]["before"] and first["eval_loss"]["before"] is None


def test_a_name_with_a_folder_a_date_and_an_ending(cli, home, first, capsys):
    """The recorded workflow has the date of the run, so that it is resumed on another day as well."""
    typed = "styles/%date:yyyy%/mine.safetensors"
    assert cli("run", "workflow.json", *FOLDERS, "--set", f"5.name={typed}", "--report", "n.json") == 0
    report = json.loads((home / "n.json").read_text("utf-8"))
    name = Path(report["lora"]).relative_to(home / "out" / "loras").as_posix()
    assert re.fullmatch(r"styles/20\d\d/mine.safetensors", name) and sha256_of(Path(report["lora"])) == report["sha256"]
    record = json.loads((Path(report["files"]["run"]) / "request.json").read_text("utf-8"))
    assert record["workflow"]["5"]["inputs"]["name"] == name.removesuffix(".safetensors")
    capsys.readouterr()
    assert cli("status", name.removesuffix(".safetensors"), "--output", "out") == 0
    assert "finished at step 3 of 3" in capsys.readouterr().out


def test_the_lora_of_another_run_is_kept(cli, home, first, capsys):
    """The same name with other settings: both files are there, and the log says which is which."""
    other = f"tiny-{Path(first['files']['run']).name.rpartition('-')[2]}.safetensors"
    assert cli("run", "workflow.json", *FOLDERS, "--set", "5.learning_rate=0.02", "--report", "o.json") == 0
    text = capsys.readouterr()
    assert f"tiny.safetensors was saved by another run; that file is now {other}" in text.out + text.err
    report = json.loads((home / "o.json").read_text("utf-8"))
    assert sha256_of(Path(first["lora"]).with_name(other)) == first["sha256"] != report["sha256"]
    assert sha256_of(Path(report["lora"])) == report["sha256"] and Path(report["lora"]) == Path(first["lora"])
    shutil.copy(Path(first["lora"]).with_name(other), first["lora"])  # for the tests after this one


def test_a_sound_workflow(cli, capsys):
    assert cli("check", "workflow.json", *FOLDERS) == 0
    assert capsys.readouterr().out == "workflow.json: no problems\n"


def test_the_version(cli, capsys):
    with pytest.raises(SystemExit) as end:
        cli("--version")
    assert end.value.code == 0 and capsys.readouterr().out == f"chroma-trainer {VERSION}\n"


def test_configurations_of_other_trainers_are_sent_to_import(cli, home, capsys):
    (home / "dataset.toml").write_text("[general]\n", "utf-8")
    assert cli("check", "dataset.toml", *FOLDERS) == 2
    assert "chroma-trainer import dataset.toml" in capsys.readouterr().err
    (home / "taken.json").write_text("{}", "utf-8")
    assert cli("import", "nowhere.json", "-o", "taken.json") == 2
    text = capsys.readouterr().err
    assert "nowhere.json: can't be read" in text and "'taken.json' exists already" in text


def test_a_field_that_is_none_lists_those_that_are(cli, capsys):
    assert cli("check", "workflow.json", *FOLDERS, "--set", "LoadChroma.model=hd") == 2
    assert "its fields are flavour, folder, diffusion_model" in capsys.readouterr().err


def test_a_users_mistake_is_exit_code_2_and_no_traceback(cli, capsys):
    assert cli("run", "nowhere.json", *FOLDERS) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: nowhere.json: can't be read: No such file or directory") and "Traceback" not in told
    assert cli("run", "workflow.json", "--models", "nowhere") == 2
    assert capsys.readouterr().err == "error: --models: 'nowhere' is not a folder; set it to ComfyUI's models folder\n"
    assert cli("run", "workflow.json", "--datasets", "nowhere") == 2
    assert (
        capsys.readouterr().err
        == "error: --datasets: 'nowhere' is not a folder; set it to a folder that contains datasets\n"
    )
    with pytest.raises(SystemExit) as caught:
        cli("run")
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "gpu", "'gpu' is not a device; use cpu, cuda, cuda:1, mps or xpu"),
        ("--output", "workflow.json", "can't write to 'workflow.json' ("),
        ("--report", "workflow.json/r.json", "can't write to 'workflow.json' ("),
        ("--report", "models", "'models' is a folder; use the path of a file"),
    ],
)
def test_a_place_where_nothing_can_be_written_is_told_before_the_training(cli, capsys, option, value, message):
    assert cli("run", "workflow.json", "--models", "models", option, value) == 2
    captured = capsys.readouterr()
    assert (
        captured.err.startswith(f"error: {option}: {message}")
        and len(captured.err.splitlines()) == 1
        and not captured.out
    )


@pytest.mark.parametrize("text", ["-3", "twelve", "nan"])
def test_a_card_of_no_size(cli, capsys, text):
    with pytest.raises(SystemExit):
        cli("plan", "workflow.json", f"--vram={text}")
    assert f"'{text}' is not a number of GB; write for example 12" in capsys.readouterr().err


def test_a_workflow_for_comfyui_alone(cli, home, capsys):
    only = {
        "3": {"class_type": "KSampler", "inputs": {"seed": 1}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0]}},
    }
    (home / "only.json").write_text(json.dumps(only), encoding="utf-8")
    assert cli("check", "only.json") == 2
    assert (
        "has nothing to run: its nodes can only run in ComfyUI (3 (KSampler)); add a LoRATrainer"
        in capsys.readouterr().err
    )


def test_a_fault_of_a_settings_node_is_told_beside_the_trainers(cli, home, capsys):
    workflow = graph(warmup_steps=3)
    workflow["7"] = {"class_type": "AdapterSettings", "inputs": {"init_lora": "nowhere.safetensors", "kind": "loraa"}}
    workflow["5"]["inputs"]["adapter"] = ["7", 0]
    (home / "adapter.json").write_text(json.dumps(workflow), encoding="utf-8")
    assert cli("check", "adapter.json", *FOLDERS) == 2
    told = capsys.readouterr().err
    assert (
        "node 7 (AdapterSettings).kind: 'loraa' is not one of" in told and "node 7 (AdapterSettings).init_lora" in told
    )
    assert "node 5 (LoRATrainer).warmup_steps: 3 warm-up steps leave nothing" in told and "Traceback" not in told


def test_the_models_of_an_extra_model_paths_file(cli, home, tmp_path, capsys):
    (tmp_path / "shared" / "diff").mkdir(parents=True)
    shutil.copytree(home / "models" / "diffusers" / "tiny-chroma", tmp_path / "shared" / "diff" / "elsewhere")
    config = tmp_path / "extra.yaml"
    config.write_text(
        "comfyui:\n  base_path: shared\n  is_default: true\n  diffusers: |\n    none\n    diff\n", encoding="utf-8"
    )
    assert cli("check", "workflow.json", "--set", "LoadChroma.folder=elsewhere", "--model-config", config) == 0
    assert cli("check", "workflow.json", "--set", "LoadChroma.folder=elsewhere") == 2
    assert "'elsewhere' is not in the diffusers folders" in capsys.readouterr().err
    shutil.copy(config, home / "extra_model_paths.yaml")
    shutil.copytree(tmp_path / "shared", home / "shared")
    assert cli("check", "workflow.json", "--set", "LoadChroma.folder=elsewhere") == 0  # found in the working folder
    (home / "extra_model_paths.yaml").unlink()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not valid YAML: "),
        ("- a\n- b", "does not have the structure of ComfyUI's extra_model_paths.yaml; compare it with "),
        ("a: 5", "does not have the structure of ComfyUI's extra_model_paths.yaml; compare it with "),
    ],
)
def test_an_extra_model_paths_file_at_fault(cli, tmp_path, capsys, text, message):
    config = tmp_path / "extra.yaml"
    config.write_text(text, encoding="utf-8")
    assert cli("check", "workflow.json", "--model-config", config) == 2
    assert capsys.readouterr().err.startswith(f"error: {config}: {message}")


def test_check_imports_nothing_heavy(home):
    """Which is why it takes 0.3 s."""
    code = (
        "import sys; from chroma_trainer.cli import main; "
        f"status = main(['check', 'workflow.json', *{FOLDERS!r}]); "
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'safetensors', 'aiohttp'} & set(sys.modules); "
        "print(status, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, env=environment())
    assert done.stdout.splitlines()[-1:] == ["0 []"], done.stdout + done.stderr


@pytest.mark.slow
def test_a_second_run_does_without_the_compiler_and_the_libraries_of_models(home, first):
    """torch's compiler takes 1.5 to 2 s to import, and so do the libraries of models.

    A run with warm caches that samples no images needs none of them.
    """
    plain = graph()
    del plain["4"], plain["5"]["inputs"]["validation"]
    (home / "no-pictures.json").write_text(json.dumps(plain), encoding="utf-8")
    code = (
        "import sys; from chroma_trainer.cli import main; "
        "LIBRARIES = ('diffusers', 'transformers', 'accelerate', 'peft', 'optimum'); "
        f"status = main(['run', 'no-pictures.json', *{FOLDERS!r}, '--set', 'LoRATrainer.name=second']); "
        "print(status, [name for name in ('torch._dynamo', *LIBRARIES) if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, env=environment())
    assert done.stdout.splitlines()[-1:] == ["0 []"], done.stdout + done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("LoRATrainer.targets=blubb",), "targets: 'blubb' matches no layer; similar names: "),
        (("LoRATrainer.targets=distilled_guidance_layer.in_proj",), "names layers that only kind full"),
        (("LoRATrainer.init=loftq",), "init: 'loftq' corrects quantization errors, but the model is not quantized"),
    ],
)
def test_what_the_run_would_refuse_is_told_by_check_without_torch(home, settings, message):
    chosen = [word for value in settings for word in ("--set", value)]
    code = (
        "import sys; from chroma_trainer.cli import main; "
        f"status = main(['check', 'workflow.json', *{FOLDERS!r}, *{chosen!r}]); print(status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, env=environment())
    assert done.stdout.split() == ["2", "False"] and message in done.stderr, done.stdout + done.stderr


def test_check_counts_captions_that_the_text_encoder_cannot_read(cli, capsys):
    assert cli("check", "workflow.json", *FOLDERS) == 0
    told = capsys.readouterr()
    assert "warning: node 5 (LoRATrainer): captions with characters that T5's vocabulary lacks: 2." in told.err
    assert "'sks, a größe', where 'öß' can't be read" in told.err and "no problems" in told.out
    assert cli("check", "workflow.json", *FOLDERS, "--set", "DatasetBackend.captions=instance prompt", "--set",
               "DatasetBackend.instance_prompt=a cat") == 0  # fmt: skip
    assert not capsys.readouterr().err


def test_captions_are_listed_as_they_are_trained(cli, capsys):
    setting = ("--set", "LoRATrainer.caption_dropout=0", "--set", "DatasetBackend.flip=1")
    assert cli("captions", "workflow.json", *FOLDERS, *setting, "--epochs", "1") == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split("\t") == ["epoch", "step", "folder", "image", "mirrored", "caption"]
    rows = [line.split("\t") for line in lines]
    assert [row[:3] + row[4:5] for row in rows] == [["1", "1", "1", "1"], ["1", "2", "1", "1"]]
    assert {row[3]: row[5] for row in rows} == {"größe.png": "sks, a größe", "猫.png": "sks, a 猫"}
    assert cli("captions", "workflow.json", *FOLDERS, "--json") == 0
    values = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [value["step"] for value in values] == [1, 2, 3] and values[0]["is_mirrored"] is False
    assert cli("captions", "workflow.json", *FOLDERS, "--set", "DatasetBackend.captions=table") == 2
    assert "has none of metadata.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli("captions", "workflow.json", "--epochs", "0")
    assert "'0' is not a number of epochs" in capsys.readouterr().err


def test_it_runs_as_a_file_from_any_folder(tmp_path):
    """After `install.py` alone: a ComfyUI's Python, no package of this name, the folder's name as git made it."""
    pack = tmp_path / "custom_nodes" / "chroma-trainer"
    for name in ("nodes", "trainer_core", "workflows", "assets"):
        shutil.copytree(PROJECT / name, pack / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "cli.py"):
        shutil.copy(PROJECT / name, pack)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [
        sys.executable,
        "custom_nodes/chroma-trainer/cli.py",
        "check",
        str(pack / "workflows" / "first-lora.json"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "") and "no problems" in done.stdout
    done = subprocess.run([*command[:2], "--help"], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.stdout.startswith("usage: chroma-trainer")


def test_inspect(cli, first, capsys):
    assert cli("inspect", first["lora"], "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["trigger"] == "sks" and said["workflow"]["5"]["inputs"]["steps"] == 3 and said["step"] == 3
    assert cli("inspect", first["lora"]) == 0
    told = capsys.readouterr().out
    assert "  trigger   sks\n" in told and "3 steps on 2 images" in told and "rank 2" in told


def test_inspect_of_other_files(cli, home, capsys):
    assert cli("inspect", "nowhere.safetensors") == 2
    assert cli("inspect", "workflow.json") == 2
    assert (
        cli("inspect", home / "models" / "diffusers" / "tiny-chroma" / "vae" / "diffusion_pytorch_model.safetensors")
        == 0
    )
    told = capsys.readouterr()
    assert "not written by ChromaTrainer" in told.out and "is not a safetensors file" in told.err


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a child")
def test_ctrl_c_ends_it_after_the_step_with_a_lora(home, tmp_path):
    settings = ["--set", "5.steps=100000", "--set", "5.checkpoint_every=1", "--set", "5.name=stopped"]
    command = [
        sys.executable,
        "-u",
        "-m",
        "chroma_trainer.cli",
        "run",
        "workflow.json",
        "--models",
        "models",
        *settings,
    ]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path)], cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        encoding="utf-8", env=environment(),
    )  # fmt: skip
    assert process.stderr
    watchdog = threading.Timer(HANGS_SECONDS, process.kill)  # ends the reading too, whatever was or was not printed
    watchdog.start()
    try:
        for line in process.stderr:
            if "checkpoint: step 1\n" in line:
                process.send_signal(signal.SIGINT)
                break
        told = process.stderr.read()
        assert process.wait(60) == 130, told
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
    assert "stopping after this step; press again to stop immediately" in told and told.endswith("canceled\n")
    assert (tmp_path / "loras" / "stopped.safetensors").stat().st_size > 1000


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process that sends itself SIGTERM")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_it_at_once(number, capfd):
    with signals_kept():
        interrupts = Interrupts()
        assert not interrupts()
        os.kill(os.getpid(), number)
        assert interrupts() and "press again to stop immediately" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


@pytest.mark.slow
def test_the_demo(cli, tmp_path, capsys, monkeypatch):
    # The score's own pictures take a minute; tests/validation has them.
    score = {"base": 0.0, "lora": 1.0, "without_trigger": 0.25, "prompts": 4, "pictures": 8}
    monkeypatch.setattr("chroma_trainer.trainer_core.commands.demo_command._score", lambda arguments, report: score)
    settings = [
        f"--set={name}" for name in ("LoRATrainer.steps=1", "LoRATrainer.warmup_steps=0", "4.steps=1", "6.steps=1")
    ]
    assert cli("demo", "--output", tmp_path, *settings) == 0
    told, report = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text("utf-8"))
    for path in (
        report["lora"],
        report["files"]["loss_chart"],
        *report["files"]["validation"],
        str(tmp_path / "report.json"),
    ):
        assert path in told and Path(path).is_file()
    assert report["learning_score"] == score
    assert "base 0%, LoRA 100%, LoRA without its trigger 25% of 8 images in the style" in told
