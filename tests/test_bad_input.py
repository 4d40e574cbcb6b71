"""Values, files and datasets at fault, each with its exact message. Faults of the workflow's form: tests/workflow/test_bad_workflows.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from chroma_trainer.nodes import CATALOGUE
from chroma_trainer.nodes.widget_schemas import schemas
from chroma_trainer.trainer_core.config.model import LEVELS
from chroma_trainer.trainer_core.data.source.folder import SUFFIXES
from chroma_trainer.trainer_core.errors import Problem, UserError
from chroma_trainer.trainer_core.host import ASSETS, Paths, SinkHost
from chroma_trainer.trainer_core.workflow.check import check
from chroma_trainer.trainer_core.workflow.execute import execute
from chroma_trainer.trainer_core.workflow.read import graph_from_json
from PIL import Image

ENDINGS = " ".join(sorted(SUFFIXES))


def nodes() -> dict:
    """A sound workflow: model 1, quantisation 2, data 3, what to draw 4, training 5."""
    return {
        "1": {"class_type": "LoadChroma", "inputs": {}},
        "2": {"class_type": "QuantizeModel", "inputs": {"model": ["1", 0], "level": "none"}},
        "3": {"class_type": "DatasetBackend", "inputs": {"folder": "cats", "resolution": 32}},
        "4": {"class_type": "ValidateSampler", "inputs": {"prompts": "a cat", "resolutions": "32x32"}},
        "5": {"class_type": "LoRATrainer", "inputs": {"model": ["2", 0], "dataset": ["3", 0], "validation": ["4", 1]}},
    }


TYPES = {node["class_type"]: key for key, node in nodes().items()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Datasets: cats (one picture), notes (none), broken (none that can be used); models: one single file."""
    for name in ("cats", "notes", "broken"):
        (tmp_path / "data" / name).mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "data" / "cats" / "a.png")
    (tmp_path / "data" / "cats" / "a.txt").write_text("a cat", encoding="utf-8")
    (tmp_path / "data" / "notes" / "a.txt").write_text("a cat", encoding="utf-8")
    (tmp_path / "data" / "broken" / "a.png").write_bytes(b"")
    (tmp_path / "data" / "broken" / "b.jpg").write_bytes(b"no picture")
    (tmp_path / "models" / "vae").mkdir(parents=True)
    (tmp_path / "models" / "vae" / "ae.safetensors").write_bytes(b"x")
    return tmp_path


@pytest.fixture
def host(root: Path, monkeypatch) -> SinkHost:
    monkeypatch.delenv("CHROMA_TRAINER_ROOTS", raising=False)
    models = {kind: (root / "models" / kind,) for kind in ("diffusion_models", "text_encoders", "vae", "diffusers")}
    paths = Paths(output=root / "out", cache=root / "cache", models=models, datasets=(root / "data",))
    return SinkHost(paths=paths, device="cpu")


def told(graph: dict, host: SinkHost, root: Path) -> list[str]:
    """What `check` says, with places of this machine written as words."""
    problems = check(graph_from_json(graph, schemas()), CATALOGUE, host)
    return [str(problem).replace(str(root), "ROOT").replace(str(ASSETS), "ASSETS") for problem in problems]


def test_the_sound_one_is_sound(host, root):
    assert told(nodes(), host, root) == []


VALUES = [
    # LoadChroma
    ("LoadChroma", {"dtype": "float16"}, "dtype: 'float16' is not one of bf16, fp16, fp32"),
    ("LoadChroma", {"dtype": "bf 16"}, "dtype: 'bf 16' is not one of bf16, fp16, fp32; did you mean 'bf16'?"),
    ("LoadChroma", {"folder": "Chroma1-HD"}, "folder: 'Chroma1-HD' is not in the diffusers folders (ROOT/models/diffusers); put it there, or name another models folder (headless: --models)"),
    ("LoadChroma", {"folder": "../../etc"}, "folder: '../../etc' is not in the diffusers folders (ROOT/models/diffusers); put it there, or name another models folder (headless: --models)"),
    ("LoadChroma", {"vae": "ea.safetensors"}, "vae: 'ea.safetensors' is not in the vae folders (ROOT/models/vae); did you mean 'ae.safetensors'?"),
    ("LoadChroma", {"diffusion_model": "x.safetensors"}, "diffusion_model: 'x.safetensors' is not in the diffusion_models folders (ROOT/models/diffusion_models); put it there, or name another models folder (headless: --models)"),
    ("LoadChroma", {"text_encoder": 5}, "text_encoder: 5 is not a string"),
    # QuantizeModel
    ("QuantizeModel", {"level": "int8"}, f"level: 'int8' is not one of {', '.join(LEVELS)}, auto; did you mean 'int8-bnb'?"),
    ("QuantizeModel", {"level": "int8_quanto"}, f"level: 'int8_quanto' is not one of {', '.join(LEVELS)}, auto; did you mean 'int8-quanto'?"),
    # DatasetBackend
    ("DatasetBackend", {"folder": ""}, "folder: is empty; enter the name of a folder of images"),
    ("DatasetBackend", {"folder": "cats/a.png"}, "folder: 'cats/a.png' is not a folder in (ROOT/data, ASSETS); put it into one of them"),
    ("DatasetBackend", {"captions": "instance prompt"}, "instance_prompt: is empty, but captions is 'instance prompt'; write the caption of all images here"),
    ("DatasetBackend", {"captions": "textfiles"}, "captions: 'textfiles' is not one of textfile, filename, instance prompt, table, json file; did you mean 'textfile'?"),
    ("DatasetBackend", {"resolution": 8}, "resolution: 8 is out of range; pixel_area is in pixels, use 16 to 8192"),
    ("DatasetBackend", {"resolution": 1.0, "resolution_type": "pixel"}, "resolution: 1 is out of range; pixel is in pixels, use 16 to 8192"),
    ("DatasetBackend", {"resolution": 1024, "resolution_type": "area"}, "resolution: 1024 megapixels is out of range; area is in megapixels, use at most 16 (1.0 is 1024 x 1024)"),
    ("DatasetBackend", {"resolution": 10000}, "resolution: 10000 is out of range; use 0.01 to 8192, nearest is 8192"),
    ("DatasetBackend", {"bucket_step": 64}, "bucket_step: 64 is not a string"),
    ("DatasetBackend", {"bucket_step": "48"}, "bucket_step: '48' is not one of auto, 64, 32, 16"),
    ("DatasetBackend", {"on_broken": "ignore"}, "on_broken: 'ignore' is not one of skip, stop"),
    ("DatasetBackend", {"crop": "center"}, "crop: 'center' is not true or false"),
    ("DatasetBackend", {"crop": 1}, "crop: 1 is not true or false"),
    ("DatasetBackend", {"min_size": -1}, "min_size: -1 is out of range; use 0 to 8192, nearest is 0"),
    ("DatasetBackend", {"repeats": 1.5}, "repeats: 1.5 is not a whole number; use 1 or 2"),
    ("DatasetBackend", {"references": "dogs"}, "references: 'dogs' is not a folder in (ROOT/data, ASSETS); put it into one of them"),
    ("DatasetBackend", {"masks": "dogs"}, "masks: 'dogs' is not a folder in (ROOT/data, ASSETS); put it into one of them"),
    ("DatasetBackend", {"unmasked_weight": 0.5}, "unmasked_weight: is 0.5, but masks is empty; set masks to a folder, or use 0"),
    # LoRATrainer
    ("LoRATrainer", {"steps": 20, "warmup_steps": 20}, "warmup_steps: 20 warm-up steps leave nothing of 20 steps; use at most 19"),
    ("LoRATrainer", {"name": "CON"}, "name: 'CON' is not a valid file name on every system; use letters, digits, spaces, - and _, and / for subfolders"),
    ("LoRATrainer", {"name": "styles/lpt1.v2"}, "name: 'styles/lpt1.v2' is not a valid file name on every system; use letters, digits, spaces, - and _, and / for subfolders"),
    ("LoRATrainer", {"name": ""}, "name: '' is not a valid file name on every system; use letters, digits, spaces, - and _, and / for subfolders"),
    ("LoRATrainer", {"name": "cats."}, "name: 'cats.' is not a valid file name on every system; use letters, digits, spaces, - and _, and / for subfolders"),
    ("LoRATrainer", {"name": "..\\cats"}, "name: '..\\cats' is outside the folder of LoRAs; use a name, or a path within it such as styles/my-lora"),
    ("LoRATrainer", {"name": "/tmp/cats"}, "name: '/tmp/cats' is outside the folder of LoRAs; use a name, or a path within it such as styles/my-lora"),
    ("LoRATrainer", {"name": "cats-%width%"}, "name: '%width%' is not known here; use %date%, %date:yyyy-MM-dd%, %year%, %month%, %day%, %hour%, %minute%, %second%, or type the value itself"),
    ("LoRATrainer", {"name": "猫" * 41}, "name: is 123 bytes long; use at most 120"),
    ("LoRATrainer", {"sigma_density": "logit_normal"}, "sigma_density: 'logit_normal' is not one of auto, chroma, uniform, logit-normal, sigmoid, beta, mode, cosmap, quadratic_tail, quadratic_tail_legacy; did you mean 'logit-normal'?"),
    ("LoRATrainer", {"lr_schedule": "cosin"}, "lr_schedule: 'cosin' is not one of constant, cosine, linear, constant_with_warmup, cosine_with_restarts, polynomial, wsd; did you mean 'cosine'?"),
    ("LoRATrainer", {"init": "corda"}, "init: 'corda' is not one of default, gaussian, orthogonal, pissa, olora, eva, loftq; did you mean 'olora'?"),
    ("LoRATrainer", {"alpha": -1}, "alpha: -1 is out of range; use 0 to 1024, nearest is 0"),
    ("LoRATrainer", {"keep_checkpoints": 0}, "keep_checkpoints: 0 is out of range; use 1 to 1000, nearest is 1"),
    ("LoRATrainer", {"seed": -1}, "seed: -1 is out of range; use 0 to 9007199254740991, nearest is 0"),
    # ValidateSampler
    ("ValidateSampler", {"prompts": " \n"}, "prompts: is empty; write one prompt per line"),
    ("ValidateSampler", {"prompts": '{"cat": 5, "dog": "a dog"}'}, "prompts: every prompt in a prompt library must be a string; not a string: cat"),
    ("ValidateSampler", {"prompts": "{}"}, "prompts: every prompt in a prompt library must be a string; not a string: (empty)"),
    ("ValidateSampler", {"resolutions": "1024"}, "resolutions: '1024' is not width x height; write for example 1024x1024"),
    ("ValidateSampler", {"resolutions": ","}, "resolutions: is empty; write for example 1024x1024"),
    ("ValidateSampler", {"resolutions": "9008x64"}, "resolutions: 9008 in '9008x64' is not a multiple of 16 from 16 to 8192; use 8192"),
    ("ValidateSampler", {"resolutions": "0x64"}, "resolutions: 0 in '0x64' is not a multiple of 16 from 16 to 8192; use 16"),
    ("ValidateSampler", {"lora_strength": ""}, "lora_strength: '' must be numbers from -10 to 10, such as 0.5, 1.0"),
    ("ValidateSampler", {"lora_strength": "0.5, 11"}, "lora_strength: '0.5, 11' must be numbers from -10 to 10, such as 0.5, 1.0"),
    ("ValidateSampler", {"lora_strength": "nan"}, "lora_strength: 'nan' must be numbers from -10 to 10, such as 0.5, 1.0"),
    ("ValidateSampler", {"cfg": 0.5}, "cfg: 0.5 is out of range; use 1 to 30, nearest is 1"),
    ("ValidateSampler", {"scheduler": "karras"}, "scheduler: 'karras' is not one of beta, simple, normal"),
    ("ValidateSampler", {"negative_prompt": None}, "negative_prompt: None is not a string"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "values", "message"), VALUES, ids=lambda value: str(value)[:40])
def test_a_value_at_fault(host, root, kind, values, message):
    graph = nodes()
    graph[TYPES[kind]]["inputs"].update(values)
    assert told(graph, host, root) == [f"node {TYPES[kind]} ({kind}).{message}"]


def test_a_folder_outside_of_what_may_be_read(host, root, tmp_path_factory):
    outside = tmp_path_factory.mktemp("private")
    graph = nodes()
    graph["3"]["inputs"]["folder"] = str(outside)
    assert told(graph, host, root) == [
        f"node 3 (DatasetBackend).folder: {str(outside)!r} is outside the allowed folders (ROOT/data, ASSETS); "
        "move it into one of them, or allow its parent folder with CHROMA_TRAINER_ROOTS (headless: --datasets)"
    ]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_that_leads_outside(host, root, tmp_path_factory):
    (root / "data" / "link").symlink_to(tmp_path_factory.mktemp("private"))
    graph = nodes()
    graph["3"]["inputs"]["folder"] = "link"
    assert told(graph, host, root) == [
        "node 3 (DatasetBackend).folder: 'link' is outside the allowed folders (ROOT/data, ASSETS); "
        "move it into one of them, or allow its parent folder with CHROMA_TRAINER_ROOTS (headless: --datasets)"
    ]


def test_a_folder_without_images(host, root):
    graph = nodes()
    graph["3"]["inputs"]["folder"] = "notes"
    message = f"no images in 'notes' or its subfolders; put files there that end in {ENDINGS}"
    assert told(graph, host, root) == [f"node 5 (LoRATrainer).dataset: {message}"]


def failure(graph: dict, host: SinkHost, root: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        execute(graph_from_json(graph, schemas()), CATALOGUE, host)
    return [str(problem).replace(str(root), "ROOT") for problem in caught.value.problems]


def test_a_dataset_of_which_nothing_can_be_used(host, root):
    graph = nodes()
    graph["3"]["inputs"]["folder"] = "broken"
    assert failure(graph, host, root) == [
        "node 5 (LoRATrainer).dataset: none of 2 images can be used: ROOT/data/broken/a.png: the file is empty; "
        "ROOT/data/broken/b.jpg: it is not an image file, despite its name"
    ]


def test_a_dataset_at_fault_where_faults_stop(host, root):
    (root / "data" / "cats" / "a.txt").write_text("\n", encoding="utf-8")
    graph = nodes()
    graph["3"]["inputs"] |= {"folder": "broken", "on_broken": "stop"}
    graph["6"] = {
        "class_type": "DatasetBackend",
        "inputs": {"folder": "cats", "on_broken": "stop", "resolution": 32, "dataset": ["3", 0]},
    }
    graph["5"]["inputs"]["dataset"] = ["6", 0]
    remedy = "fix or remove it, or set on_broken to skip"
    assert failure(graph, host, root) == [
        f"node 5 (LoRATrainer).broken: a.png: the file is empty; {remedy}",
        f"node 5 (LoRATrainer).broken: b.jpg: it is not an image file, despite its name; {remedy}",
        f"node 5 (LoRATrainer).cats: a.png: its caption file a.txt is empty; {remedy}",
    ]


def test_pictures_that_are_all_too_small(host, root):
    graph = nodes()
    graph["3"]["inputs"]["min_size"] = 512
    assert failure(graph, host, root) == [
        "node 5 (LoRATrainer).dataset: none of 1 images can be used: ROOT/data/cats/a.png: "
        "its shorter edge has 32 pixels, min_size is 512"
    ]


@pytest.mark.parametrize(
    ("beside", "fix"),
    [
        ("", "Add a .txt file next to each image"),
        ("metadata.jsonl", "metadata.jsonl lies there: set captions to 'table' to use it"),
        ("a.caption", "a.caption lies beside it: rename such files to .txt"),
        ("a.json", "a.json lies beside it: set captions to 'json file' to use such files"),
    ],
)
def test_a_dataset_without_any_caption_is_an_error_of_the_check(host, root, beside, fix):
    folder = root / "data" / "bare"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    if beside:
        (folder / beside).write_text('{"file_name": "a.png", "text": "a cat", "caption": "a cat"}', "utf-8")
    graph = nodes()
    graph["3"]["inputs"]["folder"] = "bare"
    problems = check(graph_from_json(graph, schemas()), CATALOGUE, host, warnings := [])
    assert [(p.node, p.field) for p in problems] == [("5", "dataset")] and warnings == []
    assert "none of 1 images can be used" in problems[0].message and fix in problems[0].message


def test_one_caption_is_enough(host, root):
    Image.new("RGB", (32, 32)).save(root / "data" / "cats" / "b.png")
    problems = check(graph_from_json(nodes(), schemas()), CATALOGUE, host, warnings := [])
    assert problems == [] and any("b.png: its caption file b.txt is missing" in text for text in warnings)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "it is a pointer of Git LFS to the file, not the file; fetch it with git lfs pull ("),
        (b"<!DOCTYPE html><html>log in</html>", "only .safetensors files can be read; download it again ("),
    ],
)  # fmt: skip
def test_a_model_file_that_is_no_model_file_is_told_by_the_check(host, root, content, text):
    (root / "models" / "vae" / "ae.safetensors").write_bytes(content)
    graph = nodes()
    graph["1"]["inputs"]["vae"] = "ae.safetensors"
    (problem,) = check(graph_from_json(graph, schemas()), CATALOGUE, host)
    assert problem.where == "node 1 (LoadChroma).vae"
    assert problem.message.startswith("ae.safetensors is not a complete safetensors file: ") and text in problem.message


def test_the_package_of_an_optimizer_is_told_by_the_check(host, root, monkeypatch):
    monkeypatch.setattr("chroma_trainer.trainer_core.quant.packages.version_of", lambda package: "")
    graph = nodes() | {"6": {"class_type": "OptimizerSettings", "inputs": {"optimizer": "bnb-adamw8bit"}}}
    graph["5"]["inputs"]["optimizer"] = ["6", 0]
    (problem,) = check(graph_from_json(graph, schemas()), CATALOGUE, host)
    assert problem.field == "optimizer" and "bitsandbytes is not installed" in problem.message


def test_a_file_is_no_field_of_its_node():
    assert Problem("a b/c.png", "is broken", "3", "DatasetBackend").where == "node 3 (DatasetBackend): a b/c.png"
    assert Problem("folder", "is empty", "3", "DatasetBackend").where == "node 3 (DatasetBackend).folder"
