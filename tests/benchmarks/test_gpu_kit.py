"""The GPU kit where there is no GPU: a rehearsal of some items, and what becomes of those that fail, hang or crash."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[2]
KIT = PROJECT / "benchmarks" / "gpu"
OWN = [path.stem for path in KIT.glob("*.py")]
REHEARSED = [
    "attention-math",
    "gradients-block-offload",
    "gradients-nf4-bnb",
    "memory-runs-out",
    "full-rank",
    "step-int8-quanto-512",
    "step-full-bf16-512-adafactor",
    "forecasts",
]

# As child.py, but its items are these words.
FAKE = """
import json, os, sys, time
from pathlib import Path
for line in sys.stdin:
    task = json.loads(line)
    if task["call"] == "hang":
        Path(task["part"]).write_text(json.dumps({"known": 1}))
        time.sleep(60)
    if task["call"] == "crash":
        print("illegal memory access", flush=True)
        os.abort()
    entry = {"status": "ok", "summary": "fine", "pid": os.getpid()}
    if task["call"] == "fail":
        entry = {"status": "failed", "summary": "", "faults": ["the loss is nan"]}
    Path(task["answer"] + ".tmp").write_text(json.dumps(entry))
    os.replace(task["answer"] + ".tmp", task["answer"])
"""


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of the kit by its name; afterwards none of them is known."""
    for folder in (KIT.parent, KIT):
        monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for name in [*OWN, "models"]:
        if str(getattr(sys.modules.get(name), "__file__", "")).startswith(str(KIT.parent)):
            del sys.modules[name]


def call(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CHROMA_TRAINER_SECOND_DEVICE"}
    return subprocess.run(
        [sys.executable, str(KIT / "kit.py"), *words], capture_output=True, text=True, env=environment, timeout=240
    )


@pytest.mark.slow
def test_a_rehearsal_of_some_items(tmp_path):
    done = call(
        "--rehearse",
        "--out",
        str(tmp_path / "out"),
        "--scratch",
        str(tmp_path / "scratch"),
        "--trace",
        "--only",
        *REHEARSED,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "gpu.json").read_text("utf-8"))
    header, items = found["header"], found["items"]
    assert {"device", "driver", "torch", "cuda", "cudnn", "triton", "commit", "date"} <= header.keys()
    assert header["bf16_flops"] > 0 and header["bandwidth_gb_a_second"] > 0 and header["is_rehearsal"]
    assert list(items) == ["device", *REHEARSED]
    states = {name: entry["status"] for name, entry in items.items()}
    assert states.pop("gradients-nf4-bnb") in ("ok", "skipped")  # bitsandbytes may not be there
    assert set(states.values()) == {"ok"}, done.stdout
    assert items["attention-math"]["shapes"] and not any(e["fault"] for e in items["attention-math"]["shapes"].values())
    gradients = items["gradients-block-offload"]
    assert gradients["has_bytes_of_plain"] and gradients["error"] < 0.05 and gradients["num_tensors"] > 0
    assert any("retried" in text for text in items["memory-runs-out"]["notices"])
    step = items["step-int8-quanto-512"]
    assert step["targets"] == "all+ffs" and step["seconds_a_step"] > 0 and step["launches"]["count"] > 500
    assert step["forecast"]["peak_gb"] > 0 and step["share_of_limit"] > 0
    assert (tmp_path / "out" / "trace-int8-quanto-512.json.gz").stat().st_size > 1000
    for name in items:
        assert f"  {name}: " in done.stdout
        assert {"part", "seconds", "expected_seconds", "date", "commit"} <= items[name].keys()


@pytest.fixture
def run_fakes(kit: Any, tmp_path: Path) -> Any:
    """Runs items that are words of FAKE; gives their entries as they lie on disk."""
    items, runner, results = (kit(name) for name in ("items", "runner", "results"))
    script = tmp_path / "fake.py"
    script.write_text(FAKE, "utf-8")

    def run(
        words: list[str],
        *,
        seconds: float = 60.0,
        is_shared: bool = False,
        groups: dict[str, str] | None = None,
        beside: dict[str, str] | None = None,
        parts: dict[str, str] | None = None,
    ) -> Any:
        class Impatient(items.Item):
            @property
            def patience(self) -> float:
                return 3.0 if self.call == "hang" else 60.0

        kept = results.Results(tmp_path / "gpu.json")
        started = runner.Runner(
            [sys.executable, str(script)], os.environ, tmp_path / "logs", is_shared=is_shared, is_ahead=not is_shared
        )
        group = groups or {}
        made = [
            Impatient(f"{i}-{word}", (parts or {}).get(word, "figures"), "", word, seconds=1.0,
                      group=group.get(word, ""), beside=(beside or {}).get(word, ""))
            for i, word in enumerate(words)
        ]  # fmt: skip
        try:
            runner.run_all(made, started, kept, {}, seconds, {"date": "today", "commit": None}, say=lambda line: None)
        finally:
            started.close()
        return json.loads((tmp_path / "gpu.json").read_text("utf-8"))["items"]

    return run


@pytest.mark.parametrize("is_shared", [pytest.param(False, marks=pytest.mark.slow), True])
def test_whatever_becomes_of_an_item_the_next_one_runs(run_fakes, is_shared):
    found = run_fakes(["good", "fail", "crash", "hang", "good"], is_shared=is_shared)
    assert [entry["status"] for entry in found.values()] == ["ok", "failed", "died", "timeout", "ok"]
    assert found["1-fail"]["faults"] == ["the loss is nan"]
    assert "SIGABRT" in found["2-crash"]["reason"] and "illegal memory access" in found["2-crash"]["log"]
    assert found["3-hang"]["known"] == 1 and "was ended after 3 s" in found["3-hang"]["reason"]


def test_each_item_has_a_process_but_for_groups(run_fakes):
    pids = [entry["pid"] for entry in run_fakes(["good", "good"]).values()]
    assert len(set(pids)) == 2
    pids = [
        entry.get("pid")
        for entry in run_fakes(["good", "good", "fail", "good"], groups={"good": "a", "fail": "a"}).values()
    ]
    assert pids[0] == pids[1] and pids[3] not in (None, pids[0])


def test_items_that_would_not_end_in_time_are_skipped(run_fakes):
    found = run_fakes(["good"], seconds=0.5)
    assert found["0-good"]["status"] == "skipped" and "time was over" in found["0-good"]["reason"]


@pytest.mark.slow
def test_what_would_disturb_a_figure_is_over_before_it(run_fakes, kit, monkeypatch):
    items: ModuleType = kit("items")
    monkeypatch.setattr(kit("runner"), "GRACE", 0.0)
    found = run_fakes(
        ["check", "hang", "crash", "forecast", "figure"],
        beside={"hang": items.BEFORE_FIGURES, "crash": items.BEFORE_FIGURES, "forecast": items.AT_THE_END},
        parts={"check": items.CORRECTNESS},
    )
    assert {name: entry["status"] for name, entry in found.items()} == {
        "0-check": "ok", "1-hang": "timeout", "2-crash": "died", "4-figure": "ok", "3-forecast": "ok",
    }  # fmt: skip
    assert list(found) == ["0-check", "1-hang", "2-crash", "4-figure", "3-forecast"]  # in the order in which they ended


def test_what_an_earlier_call_found_stays(kit, tmp_path):
    results: ModuleType = kit("results")
    results.Results(tmp_path / "gpu.json").add("one", {"status": "ok"})
    second = results.Results(tmp_path / "gpu.json")
    second.add("two", {"status": "ok"})
    assert list(json.loads((tmp_path / "gpu.json").read_text("utf-8"))["items"]) == ["one", "two"]
    (tmp_path / "gpu.json").write_text("{", "utf-8")
    assert results.Results(tmp_path / "gpu.json").items == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--out is missing"),
        (["--out", "x", "--only", "nonsense"], "'nonsense' is no item"),
        (["--out", "x", "--minutes", "0"], "no time"),
    ],
)
def test_wrong_arguments(words, said, tmp_path):
    done = call(*[str(tmp_path) if word == "x" else word for word in words])
    assert done.returncode == 2 and said in done.stderr


def test_items_are_named_once_and_call_what_there_is(kit):
    items = kit("items")
    names = [item.name for item in items.ITEMS]
    assert len(set(names)) == len(names)
    for item in (items.THE_DEVICE, *items.ITEMS):
        module, function = item.call.split(":")
        tree = ast.parse((KIT / f"{module}.py").read_text("utf-8"))
        assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], item.name
    assert {item.name for item in items.chosen(["correctness"])} | {
        item.name for item in items.chosen(["figures"])
    } == set(names)
    assert [item.name for item in items.chosen(["attention-*"])] == [
        name for name in names if name.startswith("attention-")
    ]


def test_time_in_which_kernels_run_is_counted_once(kit):
    launches = kit("launches")
    assert launches.busy_seconds([(0, 10), (5, 15), (20, 30), (22, 25)]) == pytest.approx(25e-9)
    second = 10**9
    events = [
        ("gemm", 0, second),
        ("gemm", second // 2, second),
        ("Memcpy HtoD", 0, 9 * second),
        ("norm", 2 * second, second),
    ]
    found = launches.figures_of(events, 5.0)
    assert (found["count"], found["copies"], found["busy_seconds"], found["kernel_seconds"]) == (3, 1, 2.5, 3.0)
    assert found["idle_share"] == 0.5 and found["longest"][0] == {"kernel": "gemm", "count": 2, "seconds": 2.0}


def test_calls_of_the_host_are_counted_and_graphs_among_them(kit):
    names = [
        "cudaLaunchKernel",
        "cudaLaunchKernelExC_v11060",
        "cuLaunchKernel",
        "cudaGraphLaunch_v10000",
        "cudaMemcpyAsync",
    ]
    assert kit("launches").calls_of([*names, "gemm", "aten::mm"]) == {"host_calls": 4, "graph_calls": 1}


def test_one_library_of_bitsandbytes_stays(kit, tmp_path):
    wheel, name = tmp_path / "bitsandbytes-1-py3-none-any.whl", "bitsandbytes-1.dist-info/RECORD"
    names = [f"bitsandbytes/libbitsandbytes_{part}.so" for part in ("cuda128", "cuda130", "cpu", "rocm72")]
    with zipfile.ZipFile(wheel, "w") as whole:
        for part in [*names, "bitsandbytes/nn.py"]:
            whole.writestr(part, "x" * 1000)
        whole.writestr(name, "".join(f"{part},sha256=abc,1000\n" for part in [*names, "bitsandbytes/nn.py", name]))
    wheels = kit("wheels")
    wheels.keep_one_library(wheel, "130")
    with zipfile.ZipFile(wheel) as kept:
        assert set(kept.namelist()) == {names[1], names[2], "bitsandbytes/nn.py", name}
        assert {line.split(",")[0] for line in kept.read(name).decode().splitlines()} == set(kept.namelist())
    with pytest.raises(SystemExit, match="no library for CUDA 999"):
        wheels.keep_one_library(wheel, "999")


def test_waits_are_listed_and_reads_are_counted(kit, tmp_path):
    loop_checks, context = kit("loop_checks"), kit("context")
    given = context.Context(torch.device("cpu"), True, tmp_path, tmp_path)
    with loop_checks.waits_listed(given) as waits:
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("does not yet detect all synchronizing operations", UserWarning, stacklevel=1)
    assert len(waits) == 1 and waits[0].startswith("test_gpu_kit.py:")
    tolist = torch.Tensor.tolist
    with loop_checks.waits_refused(given) as reads:
        assert torch.ones(2).tolist() == [1, 1]
    assert reads == [2] and torch.Tensor.tolist is tolist


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    done = call("--out", str(tmp_path), "--only", "attention-math")
    assert done.returncode == 2 and "--rehearse" in done.stderr
    assert json.loads((tmp_path / "gpu.json").read_text("utf-8"))["items"]["device"]["status"] == "failed"


def test_the_prepared_script_is_short_enough():
    assert len((KIT / "run.sh").read_bytes()) < 2000
