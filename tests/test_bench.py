"""The benchmark suite: the second formulations, the choice among forms, the pages' tables."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from tolerance import MeanErrors

from mfkernels import use_backend
from mfkernels.bench import figures, run, runtimes
from mfkernels.models import create_model
from mfkernels.models.end_to_end import EndToEndMobileFormer

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from exportable import exportable  # noqa: E402

NETWORKS = [
    ("mobile_former_26m", {}),
    ("mobile_former_96m", {}),
    ("mobile_former_96m", {"token_id": -1}),
    ("dmf_96", {}),
    ("dmf_198", {"mean": "channels", "activation": "softmax", "temperature": 3.0}),
    ("iformer_t", {}),
    ("iformer_t", {"form": "paper", "distillation": True, "layer_scale": 0.5}),
    ("iformer_m", {"window_size": 2}),
]


@pytest.mark.parametrize(("name", "options"), NETWORKS)
@pytest.mark.parametrize("batch", [1, 3])
def test_second_formulations_give_the_same_numbers(name, options, batch):
    torch.manual_seed(0)
    model = create_model(name, num_classes=10, **options)
    run.randomise(model)
    model.eval()
    images = torch.randn(12, batch, 3, 64, 96)  # of one image the largest error is luck
    errors = MeanErrors()
    with torch.no_grad(), use_backend("reference"):
        second, precise = exportable(model), copy.deepcopy(model).double()
        for x in images:
            truth = precise(x.double())
            errors.kernel(second(x), truth)
            errors.reference(model(x), truth)
    errors.check(name)


def test_the_second_formulation_of_a_detector_gives_the_same_numbers():
    torch.manual_seed(0)
    options = {"channels": 32, "queries": 5, "num_classes": 3}
    backbone = create_model("mobile_former_26m", features_only=True, token_id=-1)
    model = EndToEndMobileFormer(backbone, (1, 2), **options)
    run.randomise(model, torch.randn(2, 3, 64, 96))
    model.eval()
    errors = MeanErrors()
    with torch.no_grad(), use_backend("reference"):
        second, precise = exportable(model), copy.deepcopy(model).double()
        for x in torch.randn(40, 2, 3, 50, 64):
            truth = torch.cat(precise(x.double())[:2], -1)
            errors.kernel(torch.cat(second(x), -1), truth)
            errors.reference(torch.cat(model(x)[:2], -1), truth)
    errors.check("a detector")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mobile_former_26m", {"mixing": "mlp"}),
        ("mobile_former_26m", {"gates": (False, False, False)}),
        ("mobile_former_26m", {"token_id": 1}),
        ("mobile_former_26m", {"head_activation": "dynamic_relu"}),
    ],
)
def test_ablations_have_no_second_formulation(name, options):
    with pytest.raises(ValueError, match="exportable"):
        exportable(create_model(name, **options).eval())


def test_other_networks_have_one_formulation():
    assert list(run.formulations(torch.nn.Linear(2, 2))) == ["definition"]
    assert list(run.formulations(create_model("dmf_96").eval())) == ["definition", "exportable"]


def test_the_fastest_form_that_is_right_is_measured(monkeypatch, capsys):
    """Of four forms one fails, one is wrong and one is slow."""

    def forms(job):
        def fail():
            raise RuntimeError("no such operator")

        def wrong():
            return lambda: model(x) * 1.01

        def slow():
            return lambda: sum(model(x) for _ in range(9)) / 9

        model, x = job.formulations["definition"], job.x
        return iter([("broken", fail), ("wrong", wrong), ("slow", slow), ("fast", lambda: lambda: model(x))])

    monkeypatch.setitem(runtimes.RUNTIMES, "mine", forms)
    favourites: run.Favourites = {}
    (entry,) = run.bench(["mobile_former_26m"], ["mine"], [32], seconds=0.1, favourites=favourites)
    assert entry.form == "fast" and 0 <= entry.difference < 1e-4
    assert entry.cold_ms > 0
    shown = capsys.readouterr().err
    assert "mine, float32: skipped, broken: no such operator" in shown
    assert "mine, float32: skipped, wrong: its numbers differ by" in shown
    assert list(favourites.values()) == [["fast"]]


@pytest.mark.parametrize(
    ("runtime", "package"), [("onnxruntime", "onnxscript"), ("openvino", "openvino"), ("ncnn", "pnnx")]
)
def test_runtimes_give_the_networks_numbers(runtime, package):
    pytest.importorskip(package)
    (entry,) = run.bench(["mobile_former_26m"], [runtime], [32], seconds=0.05)
    assert entry.form.startswith(("definition", "exportable")) and entry.version
    assert 0 <= entry.difference < 1e-4


def _line(**changes):
    line = {field: "" for field in ("form", "version")} | {
        "date": "2026-01-02",
        "cpu": "A processor",
        "instruction_set": "avx2",
        "torch": "2.13.0",
        "network": "dmf_s",
        "runtime": "mfkernels",
        "size": 224,
        "batch": 1,
        "threads": 1,
        "median_ms": 2.0,
        "low_ms": 1.0,
        "high_ms": 3.0,
        "calls": 9,
        "dtype": "float32",
        "difference": 0.01,
        "cold_ms": 4.0,
    }
    return line | changes


TABLES = ("networks", "sizes", "precision", "networks-avx2")


def test_tables_are_made_of_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    rival = dict(runtime="openvino", version="1.2", form="exportable, ONNX", median_ms=3.0, cold_ms=8.0)
    lines = [_line(), _line(**rival)]
    for name in TABLES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    marks = "".join(f"<!-- bench:{name} -->outdated<!-- /bench -->\n" for name in TABLES)
    text = figures.with_tables("docs/speed.md", "before\n" + marks + "after")
    assert text.startswith("before\n") and text.endswith("after") and "outdated" not in text
    assert "One core of A processor (avx2), 2026-01-02" in text
    assert "| dmf_s | 2.00 | 3.00 | 1.50 | 4.00 | 8.00 OpenVINO | 2.00 |" in text
    assert "| cold: dmf_s, best other runtime | 8.00 OpenVINO |" in text
    assert "OpenVINO 1.2: *exportable, ONNX*: dmf_s." in text
    assert "3.00 OpenVINO" in text and "2.00 (1 %)" in text
    assert figures.with_tables("docs/speed.md", text) == text
    summary = figures.with_tables("README.md", "<!-- bench:summary --><!-- /bench -->")
    assert "| dmf_s | 2.00 | 3.00 OpenVINO | 1.50 |" in summary
    with pytest.raises(ValueError, match=r"docs/speed\.md has no <!-- bench:networks -->"):
        figures.with_tables("docs/speed.md", "nothing")


@pytest.mark.parametrize("page", figures.PAGES)
def test_the_tables_of_the_pages_are_those_of_the_results(page):
    text = (ROOT / page).read_text()
    assert figures.with_tables(page, text) == text


def test_results_of_two_machines_make_no_table(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="cpu"):
        figures._networks([_line(), _line(cpu="Another processor")])
