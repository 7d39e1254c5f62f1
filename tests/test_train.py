"""Training: recipes, data, schedules, and what happens when something breaks."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

from torch.nn import functional as F

import mfkernels
from mfkernels import cli
from mfkernels.train import __main__ as command
from mfkernels.train import checkpoint, data, digits
from mfkernels.train.classification import STOPPED, Training
from mfkernels.train.objective import Objective
from mfkernels.train.processes import Processes
from mfkernels.train.processes import processes as join
from mfkernels.train.recipe import list_recipes, load_recipe, save_recipe
from mfkernels.train.schedule import learning_rate, temperature

pytestmark = [pytest.mark.vision, pytest.mark.usefixtures("one_thread")]
ALONE = Processes(0, 1, torch.device("cpu"))
# Two classes of 32 pixels: a step takes some milliseconds.
SMALL = dict(
    epochs=2, batch_size=8, image_size=32, train_sizes=(), workers=0, warmup_epochs=1, temperature_epochs=1
)


def write_two_classes(root: Path, train: int, validation: int) -> Path:
    """The digits 0 and 1, `count` of each."""
    digits.write(root)
    for split, count in (("train", train), ("validation", validation)):
        for name in map(str, range(10)):
            paths = sorted((root / split / name).iterdir())
            for path in paths[count if name in "01" else 0 :]:
                path.unlink()
            if name not in "01":
                (root / split / name).rmdir()
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_two_classes(tmp_path_factory.mktemp("digits"), 12, 6)


def training(folder: Path, output: Path, name: str = "mobile_former_26m", **changes) -> Training:
    return Training(load_recipe(name, **(SMALL | changes)), str(folder), output, ALONE, save_minutes=1e9)


def weights(job: Training) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in job.network.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# Recipes.


def test_every_network_that_was_trained_has_a_recipe():
    models = {load_recipe(name).model for name in list_recipes()}
    measured_only = {name for name in mfkernels.models.list_models() if name.endswith("_faster")}
    assert models == set(mfkernels.models.list_models()) - measured_only


@pytest.mark.parametrize(
    ("name", "lr", "decay", "dropout", "mixup", "augment", "erase"),
    [
        ("mobile_former_26m", 8e-4, 0.08, 0.1, 0.2, True, 0.0),
        ("mobile_former_52m", 8e-4, 0.10, 0.2, 0.2, False, 0.0),
        ("mobile_former_96m", 8e-4, 0.10, 0.2, 0.0, True, 0.0),
        ("mobile_former_151m", 9e-4, 0.10, 0.2, 0.2, True, 0.2),
        ("mobile_former_214m", 9e-4, 0.15, 0.2, 0.2, True, 0.2),
        ("mobile_former_294m", 1e-3, 0.20, 0.3, 0.2, True, 0.2),
        ("mobile_former_508m", 1e-3, 0.20, 0.3, 0.2, True, 0.2),
    ],
)
def test_mobile_formers_recipes(name, lr, decay, dropout, mixup, augment, erase):
    recipe = load_recipe(name)
    assert (recipe.epochs, recipe.batch_size, recipe.interpolation) == (450, 1024, "bilinear")
    assert (recipe.lr, recipe.weight_decay, recipe.dropout) == (lr, decay, dropout)
    assert (recipe.mixup, bool(recipe.auto_augment), recipe.random_erase) == (mixup, augment, erase)


def test_recipes_survive_a_file_and_take_changes(tmp_path):
    recipe = load_recipe("dmf_s", epochs=3, train_sizes=[64])
    assert (recipe.epochs, recipe.ema_decay, recipe.temperature) == (3, 0.9995, 30.0)
    save_recipe(recipe, tmp_path / "mine.yaml")
    assert load_recipe(tmp_path / "mine.yaml") == recipe


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("mobile_former_27m", {}, ValueError, "did you mean .*mobile_former_26m"),
        ("dmf_s", {"batchsize": 3}, ValueError, "unknown settings batchsize"),
        ("dmf_s", {"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ("dmf_s", {"lr": "much"}, TypeError, "lr must be a number, got 'much'"),
        ("dmf_s", {"dtype": "int8"}, ValueError, "dtype must be"),
        ("iformer_m", {"distillation": 0.5}, ValueError, "needs a teacher"),
    ],
)
def test_bad_recipes(name, changes, error, message):
    with pytest.raises(error, match=message):
        load_recipe(name, **changes)


def test_learning_rate_is_the_released_one():
    recipe = load_recipe("iformer_m", epochs=10, warmup_epochs=2)
    steps = 7
    warm = np.linspace(0, recipe.lr, 2 * steps)
    rest = np.arange(8 * steps)
    cosine = recipe.min_lr + (recipe.lr - recipe.min_lr) / 2 * (1 + np.cos(math.pi * rest / len(rest)))
    ours = [learning_rate(recipe, step, steps) for step in range(10 * steps)]
    np.testing.assert_allclose(ours, np.concatenate([warm, cosine]), rtol=1e-12)


def test_temperature_falls_from_30_to_1():
    recipe = load_recipe("dmf_s")
    ours = [temperature(recipe, epoch * 5 + j, 5) for epoch in range(12) for j in range(5)]
    theirs = [1 + max(0, 29 * (50 - (j + 1 + 5 * e)) / 50) for e in range(12) for j in range(5)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert ours[49:] == [1.0] * 11
    assert temperature(load_recipe("iformer_m"), 3, 5) == 1.0


# Data.


def test_an_epoch_has_each_image_once_in_even_steps_of_the_recipes_sizes():
    recipe = load_recipe("dmf_s", batch_size=16)
    steps = data.epoch_steps(recipe, 403, epoch=3)
    assert sorted(np.concatenate([step.indices for step in steps]).tolist()) == list(range(403))
    assert {len(step.indices) for step in steps} <= {15, 16} and len(steps) == 26
    assert {step.size for step in steps} <= {160, 192, 224, 256, 288, 320} and len(
        {s.size for s in steps}
    ) > 3
    other = data.epoch_steps(recipe, 403, epoch=4)
    assert not np.array_equal(steps[0].indices, other[0].indices)


def test_images_do_not_depend_on_processes_and_accumulation(folder):
    def files(processes: int, parts: int) -> list[list[str]]:
        recipe = load_recipe("mobile_former_26m", **(SMALL | {"accumulation": parts}))
        reader = data.open_reader(str(folder))
        found: list[list[str]] = []
        for rank in range(processes):
            for step, (_, batches) in enumerate(
                data.TrainingData(reader, recipe, rank, processes).epoch(0, 0)
            ):
                if rank == 0:
                    found.append([])
                found[step] += [float(image.sum()) for batch in batches for image in batch.images]
        return found

    assert files(1, 1) == files(2, 1) == files(2, 2) == files(1, 4)


def assert_each_image_once(reader, count: int) -> None:
    """Two processes share an epoch's images and an evaluation's without overlap or loss."""
    recipe = load_recipe("mobile_former_26m", **SMALL)
    trained, evaluated = [], []
    for rank in (0, 1):
        for _, batches in data.TrainingData(reader, recipe, rank, 2).epoch(0, 0):
            trained += [name for batch in batches for name in batch.files]
        for batch in data.EvaluationData(reader, recipe, rank, 2, 5):
            evaluated += batch.files
    assert len(reader) == count
    assert sorted(trained) == sorted(evaluated) == sorted(map(reader.filename, range(count)))
    assert len(set(trained)) == count


def test_a_tar_file_of_each_split_is_read_as_folders_are(folder, tmp_path):
    for split in ("train", "validation"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(folder / split, arcname=".")
    reader = data.open_reader(str(tmp_path))
    assert data.class_names(reader) == data.class_names(data.open_reader(str(folder))) == ["0", "1"]
    assert len(data.open_reader(str(tmp_path), split="validation")) == 12
    assert_each_image_once(reader, 24)


def test_shards_are_read_as_numbered_images(folder, tmp_path, monkeypatch):
    """Webdataset's shards, with a class in a file beside each image, through Hugging Face's library."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for split in ("train", "validation"):
        (tmp_path / "shards" / split).mkdir(parents=True)
        images = sorted((folder / split).glob("*/*.png"))
        for part in range(3):
            with tarfile.open(tmp_path / "shards" / split / f"{part}.tar", "w") as shard:
                for image in images[part::3]:
                    label = tmp_path / f"{image.stem}.cls"
                    label.write_text(image.parent.name)
                    for path in (image, label):
                        shard.add(path, arcname=path.name)
    given = dict(dataset=f"hfds/{tmp_path / 'shards'}", keys=("png", "cls"))
    reader = data.open_reader(str(tmp_path / "copy"), **given)
    assert_each_image_once(reader, 24)
    assert {reader[index][1] for index in range(24)} == {0, 1}
    recipe = load_recipe("mobile_former_26m", **(SMALL | {"epochs": 1}))
    with pytest.raises(ValueError, match="give num_classes"):
        Training(recipe, str(tmp_path / "copy"), tmp_path / "run", ALONE, **given)
    job = Training(recipe, str(tmp_path / "copy"), tmp_path / "run", ALONE, num_classes=2, **given)
    job.run()
    assert job.rows[0]["unreadable"] == 0


@pytest.mark.parametrize("name", ["wds/x", "hfids/x", "tfds/x"])
def test_datasets_without_numbers_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} gives its images in an order of its own"):
        data.open_reader(str(tmp_path), name)


# Training.


def test_mixing_and_smoothing_are_the_formulas():
    recipe = load_recipe("iformer_t", model="iformer_t")
    logits, shares = torch.randn(4, 5), torch.rand(4, 5).softmax(-1)
    smooth = 0.9 * shares + 0.1 / 5
    expected = -(smooth * logits.log_softmax(-1)).sum()
    torch.testing.assert_close(Objective(recipe)(logits, torch.empty(4, 3, 1, 1), shares), expected)


def test_distillation_is_half_the_classes_and_half_the_teachers():
    recipe = load_recipe("iformer_t_distilled", label_smoothing=0.0)
    teacher = lambda images: images.mean((2, 3))  # noqa: E731
    own, taught, images, targets = (
        torch.randn(4, 3),
        torch.randn(4, 3),
        torch.randn(4, 3, 2, 2),
        torch.tensor([0, 2, 1, 1]),
    )
    objective = Objective(recipe)
    objective.teacher = torch.nn.Module()
    objective.teacher.forward = teacher
    expected = 0.5 * F.cross_entropy(own, targets, reduction="sum") + 0.5 * F.cross_entropy(
        taught, images.mean((2, 3)).argmax(-1), reduction="sum"
    )
    torch.testing.assert_close(objective((own, taught), images, targets), expected)


@pytest.mark.parametrize("name", ["mobile_former_26m", "dmf_96", "iformer_t"])
def test_stopping_and_going_on_gives_the_same_bits(name, folder, tmp_path, monkeypatch):
    changes = {"train_sizes": (32, 64)} if name == "dmf_96" else {}
    whole = training(folder, tmp_path / "whole", name, **changes)
    whole.run()
    job = training(folder, tmp_path / "halves", name, **changes)
    shown = job._show

    def show(*arguments):
        shown(*arguments)
        if (job.epoch, job.step) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(job, "_show", show)
    with pytest.raises(SystemExit) as stopped:
        job.run()
    assert stopped.value.code == STOPPED
    again = training(folder, tmp_path / "halves", name, **changes)
    assert (again.epoch, again.step) == (1, 2)
    again.run()
    assert_same(weights(whole), weights(again))
    if whole.average:
        assert_same(whole.average.module.state_dict(), again.average.module.state_dict())
    drop = {"images_per_second"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in whole.rows] == [
        {k: v for k, v in row.items() if k not in drop} for row in again.rows
    ]


def test_the_folder_holds_what_the_documentation_says(folder, tmp_path):
    job = training(folder, tmp_path, epochs=1)
    job.run()
    names = {path.name for path in tmp_path.iterdir()}
    assert {"recipe.yaml", "best.pt", "history.csv", "curves.png", "checkpoint-00001-0000000.pt"} <= names
    model = mfkernels.models.create_model("mobile_former_26m", num_classes=2, checkpoint=tmp_path / "best.pt")
    assert_same(model.state_dict(), job.network.state_dict())
    assert load_recipe(tmp_path / "recipe.yaml") == job.recipe
    with pytest.raises(ValueError, match="other settings of lr"):
        training(folder, tmp_path, epochs=1, lr=1.0)


def test_tensorboard_has_the_histories_numbers(folder, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    job = training(folder, tmp_path)
    job.run()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(job.rows[0])
    for name in ("loss", "top1", "lr"):
        told = [(event.step, event.value) for event in events.Scalars(name)]
        assert told == [(row["epoch"], pytest.approx(row[name], rel=1e-6)) for row in job.rows]


def test_a_truncated_checkpoint_gives_way_to_the_one_before(folder, tmp_path, capsys):
    job = training(folder, tmp_path)
    job._save()
    job.epoch = 1
    job._save()
    newest = tmp_path / "checkpoint-00001-0000000.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert checkpoint.load_newest(tmp_path)["epoch"] == 0
    assert "checkpoint-00001-0000000.pt cannot be read" in capsys.readouterr().err


def test_processes_with_different_folders_are_refused(folder, tmp_path, monkeypatch):
    training(folder, tmp_path)._save()
    monkeypatch.setattr(Processes, "gather", lambda self, here: [here, (1, 0)])
    with pytest.raises(ValueError, match=r"the same folder for all processes.*\(0, 0\), \(1, 0\)"):
        training(folder, tmp_path)


def test_only_the_last_checkpoints_stay(tmp_path):
    for step in range(5):
        assert checkpoint.save(tmp_path, {"step": step}, 0, step, keep=2)
    assert [path.name[-10:] for path in sorted(tmp_path.iterdir())] == ["0000003.pt", "0000004.pt"]


def test_a_full_disk_loses_nothing(tmp_path, capsys):
    assert checkpoint.save(tmp_path, {"values": torch.zeros(10)}, 0, 0, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert not checkpoint.save(tmp_path, {"values": torch.randn(1_000_000)}, 0, 1, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "could not be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000-0000000.pt"]
    assert checkpoint.load_newest(tmp_path)["values"].equal(torch.zeros(10))


def test_an_unreadable_image_is_named_left_out_and_counted(folder, tmp_path, capsys):
    root = tmp_path / "data"
    subprocess.run(["cp", "-r", str(folder), str(root)], check=True)
    broken = sorted((root / "train" / "1").iterdir())[0]
    broken.write_bytes(b"no image")
    job = training(root, tmp_path / "run", epochs=1)
    job.run()
    assert job.rows[0]["unreadable"] == 1
    assert str(broken.name) in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_with_the_files_names(folder, tmp_path):
    job = training(folder, tmp_path)
    with torch.no_grad():
        job.network.stem[0].weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"epoch 0, step 0: the loss is nan.*\.png"):
        job.run()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 9, "accumulation": 2}, "batch_size 9 must be a multiple of 2"),
        ({"batch_size": 8, "accumulation": 8}, "at least 2 images"),
    ],
)
def test_bad_batches(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        training(folder, tmp_path, **changes)


def test_bad_folders_and_weights(folder, tmp_path):
    with pytest.raises(ValueError, match="no images"):
        training(tmp_path, tmp_path / "run")
    model = mfkernels.models.create_model("mobile_former_26m", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "five.pt")
    recipe = load_recipe("mobile_former_26m", **SMALL)
    with pytest.raises(ValueError, match="other shapes"):
        Training(recipe, str(folder), tmp_path / "run", ALONE, weights=tmp_path / "five.pt")


def test_the_command(folder, tmp_path, capsys):
    assert command.main(["recipes"]) == 0
    assert "dmf_xs" in capsys.readouterr().out.split()
    assert command.main(["classification", str(folder), "--recipe", "iformer_q"]) == 1
    assert "did you mean" in capsys.readouterr().err


def test_evaluation_counts_right_answers_and_agreement(folder, tmp_path, capsys):
    job = training(folder, tmp_path, epochs=1)
    job.run()
    given = ["evaluate", str(folder), "--model", "mobile_former_26m", "--size", "32"]
    assert cli.main([*given, "--checkpoint", str(tmp_path / "best.pt")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [float(line[1]) for line in lines[1:3]] == [pytest.approx(job.rows[0]["top1"], abs=0.01)] * 2
    assert [line[2] for line in lines[1:3]] == ["100.00"] * 2  # of two classes
    assert " ".join(lines[3]) == "both say the same of 100.00 % of 12 images"
    torch.save(
        mfkernels.models.create_model("mobile_former_26m", num_classes=3).state_dict(), tmp_path / "3.pt"
    )
    with pytest.raises(SystemExit):
        cli.main([*given, "--checkpoint", str(tmp_path / "3.pt")])
    assert "other shapes" in capsys.readouterr().err


# Two processes.

_TWICE = """
import json, sys
import torch
from pathlib import Path
from mfkernels.train.classification import Training
from mfkernels.train.processes import processes
from mfkernels.train.recipe import load_recipe

root, output, name, settings = sys.argv[1:]
with processes() as own:
    job = Training(load_recipe(name, **json.loads(settings)), root, Path(output), own, save_minutes=1e9)
    losses, shown = [], job._show
    job._show = lambda *given: (losses.append(float(job.sums[0])), shown(*given))
    job.run()
    if own.first:
        end = {"losses": losses, "weights": dict(job.network.named_parameters())}
        torch.save(end, Path(output) / "end.pt")
    torch.save(job.evaluated.state_dict(), Path(output) / f"evaluated-{own.rank}.pt")
"""

_KILLED = """
    import os, signal
    once, step = Path(output, "once"), job._train_step

    def killed(*given):
        if (job.epoch, job.step, own.rank) == (1, 1, 1) and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*given)

    job._train_step, job.save_seconds = killed, 0
    job.run()
"""


def start(processes: int, script: Path, *arguments: str, restarts: int = 0) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launcher += [f"--max-restarts={restarts}"]
    root = str(Path(mfkernels.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launcher, str(script), *arguments], env=environment)


@pytest.mark.parametrize("name", ["mobile_former_26m", "dmf_96", "iformer_t"])
def test_two_processes_equal_one_with_accumulation(name, tmp_path):
    folder = write_two_classes(tmp_path / "data", 100, 6)
    script = tmp_path / "twice.py"
    script.write_text(_TWICE)
    # 50 steps without momentum of second order, which makes large steps of gradients that are rounding alone.
    settings = SMALL | dict(epochs=2, optimizer="sgd", lr=0.01, warmup_epochs=0, weight_decay=0.0)
    ends = []
    for processes, parts in ((1, 2), (2, 1)):
        output = tmp_path / str(processes)
        given = json.dumps(settings | {"accumulation": parts})
        assert start(processes, script, str(folder), str(output), name, given).wait(300) == 0
        ends.append(torch.load(output / "end.pt", weights_only=True))
    one, two = ends
    assert len(one["losses"]) == len(two["losses"]) >= 50
    torch.testing.assert_close(one["losses"], two["losses"], rtol=1e-4, atol=1e-4)
    for key, value in one["weights"].items():
        torch.testing.assert_close(value, two["weights"][key], rtol=1e-3, atol=1e-4, msg=key)
    # Running statistics, too, are the same in both when they are evaluated.
    assert_same(*(torch.load(tmp_path / "2" / f"evaluated-{rank}.pt", weights_only=True) for rank in (0, 1)))


def test_a_restart_does_not_see_the_addresses_of_the_processes_before(monkeypatch):
    kept = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    settings = dict(RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1, MASTER_ADDR="localhost", MASTER_PORT=kept.port)
    settings |= dict(TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=1)
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    kept.set("address", "before")
    joined = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda _, **given: joined.update(given))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with join():
        store = joined["store"]
        assert not store.check(["address"])
        store.set("address", "now")
        assert store.get("address") == b"now"
    assert kept.get("address") == b"before"


def test_a_killed_process_costs_what_came_after_the_last_checkpoint(folder, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(_TWICE.replace("    job.run()", _KILLED))
    given = json.dumps(SMALL)
    name = "mobile_former_26m"
    assert start(2, script, str(folder), str(tmp_path / "a"), name, given, restarts=1).wait(300) == 0
    assert (tmp_path / "a" / "once").exists()
    plain = tmp_path / "plain.py"
    plain.write_text(_TWICE)
    assert start(2, plain, str(folder), str(tmp_path / "b"), name, given).wait(300) == 0
    ends = [torch.load(tmp_path / run / "end.pt", weights_only=True)["weights"] for run in "ab"]
    assert_same(*ends)
