"""What differs on Windows and macOS, as far as another system can show it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.host import PACKAGE, Paths
from chroma_trainer.trainer_core.models.loading.locate import weight_files
from chroma_trainer.trainer_core.runs.portable import is_absolute, portable, portable_path
from chroma_trainer.trainer_core.validation.sample_images import file_names

SCRIPT = Path(__file__).parent / "fixtures" / "without_posix.py"
WORKFLOW = PACKAGE / "workflows" / "first-lora.json"
QUICK = ("LoRATrainer.steps=1", "LoRATrainer.warmup_steps=0", "4.steps=1", "6.steps=1", "LoRATrainer.name=\u00e9\u732b")


@pytest.mark.slow  # test_console.py tries the same console without a process of its own
@pytest.mark.parametrize("command", ["check", "run"])
def test_without_posix_on_a_console_in_cp1252(command, tmp_path):
    """Every module is imported, and the embedded model is trained."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0",
        "LC_ALL": "C.UTF-8",
    }  # fmt: skip
    arguments = [command, str(WORKFLOW), *(f"--set={setting}" for setting in QUICK), "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", str(SCRIPT), *arguments],
        cwd=tmp_path, env=environment, capture_output=True, timeout=600,
    )  # fmt: skip
    shown = (done.stdout + done.stderr).decode("cp1252")
    assert done.returncode == 0, shown
    if command == "run":
        assert (tmp_path / "loras" / "\u00e9\u732b.safetensors").is_file()
        assert "\u00e9\\u732b.safetensors" in shown


WINDOWS_PATHS = [
    r"C:\Users\Ann\cats", "C:/Users/Ann/cats", "c:\\Users/Ann\\cats\\", r"\\server\share\cats", r"\\?\C:\Users\Ann\cats",
    r"\Users\Ann\cats", r'"D:\my data\cats"', "file:///C:/Users/Ann/cats",
]  # fmt: skip


@pytest.mark.parametrize("path", WINDOWS_PATHS)
def test_a_path_of_windows_is_recorded_by_its_name(path, tmp_path):
    name = PureWindowsPath(path.strip('"').removeprefix("file:///")).name
    assert is_absolute(path) and portable_path(path, Paths(tmp_path, tmp_path)) == name == "cats"


@pytest.mark.parametrize("text", [r"\(series\), a cat", "a/b", r"styles\cats", r"\o/ a cat", "ratio 1:2", r"C:", "\\"])
def test_other_texts_with_backslashes_and_colons_stay(text, tmp_path):
    assert portable(text, Paths(tmp_path, tmp_path)) == text


@pytest.mark.parametrize("text", [r"see C:\Users\Ann\notes", "see c:/users/ann/notes", r"see C:\\Users\\Ann\notes"])
def test_the_home_folder_of_windows_is_hidden_however_it_is_written(text, tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, r"C:\Users\Ann")
    shown = portable(text, Paths(tmp_path, tmp_path))
    assert shown.replace("\\", "/") == "see ~/notes"


def test_names_with_backslashes_are_found(tmp_path):
    """Workflows that were saved on Windows name files in subfolders so."""
    (tmp_path / "loras" / "styles").mkdir(parents=True)
    (tmp_path / "loras" / "styles" / "cat.safetensors").write_bytes(b"x")
    (tmp_path / "data" / "my cats" / "big").mkdir(parents=True)
    paths = Paths(tmp_path, tmp_path, {"loras": (tmp_path / "loras",)}, (tmp_path / "data",))
    assert paths.find_model("loras", r"styles\cat.safetensors", "lora").name == "cat.safetensors"
    assert paths.find_dataset(r"my cats\big", "folder").name == "big"
    for outside in (r"..\..\x", r"C:\Windows\x.safetensors"):
        with pytest.raises(UserError):
            paths.find_model("loras", outside, "lora")
        with pytest.raises(UserError):
            paths.find_dataset(outside, "folder")


@pytest.mark.parametrize("typed", [r"C:\Users\Ann\my cats", r"\\server\share\cats", r"cats\big"])
def test_errors_show_a_path_as_it_was_typed(typed, tmp_path):
    with pytest.raises(UserError) as caught:
        Paths(tmp_path, tmp_path, {"loras": ()}, (tmp_path,)).find_dataset(typed, "folder")
    assert str(caught.value).startswith(f"folder: '{typed}' is ")


@pytest.mark.parametrize("name", ["../x.safetensors", r"..\x.safetensors", "C:x.safetensors", r"C:\x.safetensors"])
def test_an_index_names_files_beside_it_alone_on_every_system(name, tmp_path):
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {{"a": "{name}"}}}}'.replace("\\", "\\\\"), "utf-8")
    with pytest.raises(UserError, match="outside of its folder"):
        weight_files(tmp_path)


def test_prompts_named_as_devices_become_files():
    labels = ["CON", "nul", "com1.a", "aux", "AUX", "a" * 59 + " b", "dot" * 19 + "xx.y.", "cat"]
    names = list(file_names(labels).values())
    assert names[:5] == ["_CON", "_nul", "_com1.a", "_aux", "_AUX-2"] and names[-1] == "cat"
    assert all(name == name.rstrip(" .") and len(name) <= 61 for name in names)
