"""Training of detectors: sets in COCO's format, average precision, recipes, and stopping and going on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pytest.importorskip("pycocotools")

from PIL import Image

import mfkernels
from mfkernels.models import EndToEndMobileFormer, FeaturePyramid, MobileFormer, create_model
from mfkernels.train import __main__ as command
from mfkernels.train import detection_data, detectors, digits_on_photos
from mfkernels.train.coco import MEASURES, average_precision, load_annotations
from mfkernels.train.detection import DetectionTraining
from mfkernels.train.detection_recipe import (
    list_detection_recipes,
    load_detection_recipe,
    step_learning_rate,
)
from mfkernels.train.loop import STOPPED
from mfkernels.train.processes import Processes
from mfkernels.train.recipe import save_recipe

pytestmark = [pytest.mark.vision, pytest.mark.usefixtures("one_thread")]
ALONE = Processes(0, 1, torch.device("cpu"))
SMALL = dict(epochs=2, batch_size=4, workers=0, milestones=(), warmup_steps=0, short_side=64, long_side=96)
NAMES = {"retinanet": "digits_retinanet", "end_to_end": "digits_end_to_end"}


@pytest.fixture(autouse=True)
def small_detectors(monkeypatch):
    """End-to-end detectors of two small scales."""
    made = detectors.create_model

    def create(name, **options):
        if not name.startswith("e2e_"):
            return made(name, **options)
        rows = [("D", 2, 8, 1, 1, 0), *(("D", 3, width, 1, 2, 2) for width in (12, 16, 24, 32))]
        network = MobileFormer(rows, stem_channels=8, token_dim=32, token_num=3, token_id=-1)
        settings = dict(channels=64, num_heads=4, expansion=2) | options
        return EndToEndMobileFormer(FeaturePyramid(network), (2, 1), **settings)

    monkeypatch.setattr(detectors, "create_model", create)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight images for training, four for validation."""
    root = tmp_path_factory.mktemp("set")
    digits_on_photos.write(root, 8, 4, 64)
    return root


def training(folder: Path, output: Path, kind: str, **changes) -> DetectionTraining:
    recipe = load_detection_recipe(NAMES[kind], **(SMALL | changes))
    return DetectionTraining(recipe, folder, output, ALONE, save_minutes=1e9)


def a_set(folder: Path, *, name: str = "train", **changes) -> Path:
    """A set of one 30x20 photo with one object, some of its parts changed."""
    content = dict(
        images=[dict(id=7, file_name="a.png", width=30, height=20)],
        categories=[dict(id=3, name="cat"), dict(id=1, name="dog")],
        annotations=[dict(id=5, image_id=7, category_id=3, bbox=[2, 3, 10, 8])],
    )
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    Image.new("RGB", (30, 20), "blue").save(folder / name / "a.png")
    (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content | changes))
    return folder


def annotation(**changes) -> list[dict]:
    return [dict(id=5, image_id=7, category_id=3, bbox=[2, 3, 10, 8]) | changes]


# Sets.


def test_annotations(tmp_path):
    crowd = dict(id=6, image_id=7, category_id=1, bbox=[0, 0, 30, 20], iscrowd=1)
    over = dict(id=8, image_id=7, category_id=1, bbox=[-0.5, 10, 31, 10.5])
    flat = dict(id=9, image_id=7, category_id=1, bbox=[4, 4, 0, 5])
    found = load_annotations(a_set(tmp_path, annotations=[*annotation(), crowd, over, flat]), "train")
    assert (found.names, found.category_ids, found.left_out) == (["dog", "cat"], [1, 3], 1)
    (photo,) = found.photos
    assert photo.boxes.tolist() == [[2, 3, 12, 11], [0, 10, 30, 20]] and photo.labels.tolist() == [1, 0]
    assert photo.path.is_file()


def test_a_photo_without_objects_stays(tmp_path):
    (photo,) = load_annotations(a_set(tmp_path, annotations=[]), "train").photos
    assert photo.boxes.shape == (0, 4) and photo.labels.shape == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(annotations=annotation(category_id=2)), "annotation 5 is of category 2, which is not among"),
        (dict(annotations=annotation(image_id=8)), "annotation 5 is of image 8, which is not among"),
        (
            dict(annotations=annotation(bbox=[25, 3, 10, 8])),
            r"annotation 5 has a bbox outside .*30x20 .*a\.png",
        ),
        (dict(annotations=annotation(bbox=[2, 3, -1, 8])), "annotation 5 must have a bbox of left"),
        (dict(annotations=annotation(bbox=[2, 3, 10])), "annotation 5 must have a bbox of left"),
        (dict(annotations=annotation(bbox=[2, 3, float("nan"), 8])), "annotation 5 must have a bbox of left"),
        (dict(annotations=annotation() * 2), "annotations has the id 5 twice"),
        (dict(annotations=[dict(id=5)]), "each of annotations must have image_id, category_id, bbox"),
        (dict(images=[dict(id=7, file_name="a.png")]), "each of images must have width, height"),
        (dict(images=[], annotations=[]), "must have an image and a category at least"),
    ],
)
def test_bad_annotations(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_annotations(a_set(tmp_path, **changes), "train")


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="no annotations of the split 'train'"):
        load_annotations(tmp_path, "train")
    path = a_set(tmp_path) / "annotations" / "instances_train.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="no annotations of the split 'train'"):
        load_annotations(tmp_path, "train")
    path.write_text('{"images": []}')
    with pytest.raises(ValueError, match="must hold images, categories and annotations"):
        load_annotations(tmp_path, "train")


def test_precision_of_known_results(tmp_path):
    truth = load_annotations(a_set(tmp_path), "train")
    right = dict(image_id=7, category_id=3, bbox=[2, 3, 10, 8], score=0.9)
    all_right = dict.fromkeys(MEASURES, 100.0) | {"APm": 0.0, "APl": 0.0}
    assert average_precision(truth, [right]) == pytest.approx(all_right)
    assert average_precision(truth, [right | {"category_id": 1}])["AP50"] == 0
    moved = average_precision(truth, [right | {"bbox": [4, 3, 10, 8]}])  # overlap 2/3: right up to 0.65
    assert moved["AP50"] > 99.9 and moved["AP75"] == 0 and abs(moved["AP"] - 40) < 1e-6
    assert average_precision(truth, []) == dict.fromkeys(MEASURES, 0.0)


def test_digits_on_photos(folder, tmp_path, monkeypatch):
    for split, count in (("train", 8), ("validation", 4)):
        found = load_annotations(folder, split)
        assert found.names == list("0123456789") and len(found.photos) == count and not found.left_out
        for photo in found.photos:
            assert 1 <= len(photo.boxes) <= 5
            pixels = np.asarray(Image.open(photo.path)).astype(int)
            for left, top, right, bottom in photo.boxes.astype(int):
                assert pixels[top:bottom, left:right].max() > 128  # the ink; photographs are darker
                assert 4 <= bottom - top <= 26 and 4 <= right - left <= 26
    digits_on_photos.write(tmp_path, 8, 4, 64)
    for path in folder.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / path.relative_to(folder)).read_bytes()
    # The photographs of scikit-learn, where there is no scikit-image.
    monkeypatch.setitem(sys.modules, "skimage", None)
    digits_on_photos.write(tmp_path / "other", 1, 1, 64)
    assert load_annotations(tmp_path / "other", "train").photos[0].path.is_file()
    with pytest.raises(ValueError, match="side must be at least 32, got 8"):
        digits_on_photos.write(tmp_path, 8, 4, 8)


# Images.


def test_images_and_boxes_are_flipped_and_resized_together(tmp_path):
    root = a_set(tmp_path)
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[3:11, 2:12] = 255
    Image.fromarray(pixels).save(root / "train" / "a.png")
    recipe = load_detection_recipe("digits_retinanet", **(SMALL | dict(hflip=1.0, short_side=40)))
    photos = detection_data.DetectionPhotos(load_annotations(root, "train"), recipe)
    for key, box in (((0, 0), [36, 6, 56, 22]), ((None, 0), [4, 6, 24, 22])):
        image, target, _, broken = photos[key]
        assert image.shape == (3, 40, 60) and image.dtype == torch.float32 and not broken
        assert target["boxes"].tolist() == [box] and target["labels"].tolist() == [1]
        left, top, right, bottom = box
        assert image[:, top + 2 : bottom - 2, left + 2 : right - 2].min() == 1
        assert image.mean() < 1.1 * (right - left) * (bottom - top) / 2400


def test_images_do_not_depend_on_the_processes(folder):
    annotations = load_annotations(folder, "train")
    recipe = load_detection_recipe("digits_retinanet", **(SMALL | dict(hflip=0.5)))

    def images(processes: int) -> list[list[float]]:
        steps: list[list[float]] = [[], []]
        for rank in range(processes):
            data = detection_data.DetectionData(annotations, recipe, rank, processes)
            for step, (count, (batch,)) in enumerate(data.epoch(1, 0)):
                assert count == 4
                steps[step] += [float(image[:, :, :32].sum()) for image in batch.images]
        return steps

    assert images(1) == images(2)


def test_batches_that_do_not_fit(folder):
    annotations = load_annotations(folder, "train")
    for changes, processes, message in (
        (dict(batch_size=4), 3, "batch_size 4 must be a multiple of 3 processes"),
        (dict(batch_size=4), 4, "must have at least 2 images, since batch norm needs them"),
    ):
        recipe = load_detection_recipe("digits_retinanet", **(SMALL | changes))
        with pytest.raises(ValueError, match=message):
            detection_data.DetectionData(annotations, recipe, 0, processes)


# Recipes.


def test_recipes_are_the_papers(tmp_path):
    assert len(list_detection_recipes()) == 13
    for size in ("151m", "214m", "294m", "508m"):
        recipe = load_detection_recipe(f"retinanet_mobile_former_{size}")
        assert (recipe.model, recipe.epochs, recipe.batch_size) == (f"mobile_former_{size}", 12, 16)
        recipe = load_detection_recipe(f"e2e_mobile_former_{size}")
        assert (recipe.model, recipe.epochs, recipe.batch_size) == (f"e2e_mobile_former_{size}", 300, 16)
        assert (recipe.lr, recipe.backbone_lr, recipe.milestones) == (1e-4, 0.1, (200,))
        assert (recipe.weight_decay, recipe.dropout, recipe.queries) == (1e-4, 0.1, 100)
    recipe = load_detection_recipe("retinanet_dmf_s")
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay) == ("adamw", 1e-4, 1e-4)
    assert (recipe.frozen_blocks, recipe.freeze_norms) == (4, False)
    save_recipe(recipe, tmp_path / "mine.yaml")
    assert load_detection_recipe(tmp_path / "mine.yaml") == recipe


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("retinanet_dmf_m", {}, ValueError, "did you mean .*retinanet_dmf_s"),
        ("digits_retinanet", {"model": "resnet50"}, ValueError, "model must be one of .*got 'resnet50'"),
        ("digits_retinanet", {"milestones": [5, 3]}, ValueError, "milestones must be growing epochs"),
        ("digits_retinanet", {"optimizer": "lamb"}, ValueError, "optimizer must be one of adamw, sgd"),
        ("digits_retinanet", {"frozen_blocks": 4}, ValueError, "frozen_blocks must be 0 for mobile_former"),
        ("digits_retinanet", {"anchor_side": 3}, ValueError, "anchor_side must be at least 4, got 3"),
        ("digits_retinanet", {"short_side": 0}, ValueError, "short_side must be at least 1, got 0"),
    ],
)
def test_bad_recipes(name, changes, error, message):
    with pytest.raises(error, match=message):
        load_detection_recipe(name, **changes)


def test_learning_rate():
    recipe = load_detection_recipe("retinanet_dmf_s", warmup_steps=10, milestones=[2, 3])
    rates = [step_learning_rate(recipe, step, 10) for step in range(40)]
    assert rates[0] == pytest.approx(1e-7) and rates[5] == pytest.approx(0.5005e-4)
    np.testing.assert_allclose(rates[10:], [1e-4] * 10 + [1e-5] * 10 + [1e-6] * 10, rtol=1e-12)


# Training.


@pytest.mark.parametrize("kind", NAMES)
def test_stopping_and_going_on_gives_the_same_bits(kind, folder, tmp_path, monkeypatch):
    whole = training(folder, tmp_path / "whole", kind)
    whole.run()
    job = training(folder, tmp_path / "halves", kind)
    shown = job._show

    def show(*arguments):
        shown(*arguments)
        if (job.epoch, job.step) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(job, "_show", show)
    with pytest.raises(SystemExit) as stopped:
        job.run()
    assert stopped.value.code == STOPPED
    again = training(folder, tmp_path / "halves", kind)
    assert (again.epoch, again.step) == (1, 2)
    again.run()
    theirs = again.network.state_dict()
    assert [k for k, v in whole.network.state_dict().items() if not torch.equal(v, theirs[k])] == []
    drop = {"images_per_second"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in whole.rows] == [
        {k: v for k, v in row.items() if k not in drop} for row in again.rows
    ]
    with pytest.raises(ValueError, match="other settings of lr"):
        training(folder, tmp_path / "whole", kind, lr=1.0)
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"recipe.yaml", "best.pt", "history.csv", "curves.png"} <= names
    assert (
        (tmp_path / "whole" / "history.csv").read_text().startswith("epoch,lr,loss,AP,AP50,AP75,APs,APm,APl")
    )


FITTING = {
    "retinanet": dict(epochs=15, milestones=(12,), backbone_lr=1.0, anchor_side=8),
    "end_to_end": dict(epochs=40, milestones=(30,), dropout=0.0),
}


@pytest.mark.parametrize("kind", FITTING)
def test_a_small_detector_fits_eight_images(kind, folder, tmp_path):
    """Each is there eight times in an epoch, and is what is evaluated on."""
    root = tmp_path / "set"
    root.mkdir()
    (root / "train").symlink_to(folder / "train")
    (root / "validation").symlink_to(folder / "train")
    (root / "annotations").mkdir()
    content = json.loads((folder / "annotations" / "instances_train.json").read_text())
    (root / "annotations" / "instances_validation.json").write_text(json.dumps(content))
    many = dict(content, images=[], annotations=[])
    for again in range(8):
        many["images"] += [image | {"id": image["id"] + 100 * again} for image in content["images"]]
        many["annotations"] += [
            a | {"id": a["id"] + 1000 * again, "image_id": a["image_id"] + 100 * again}
            for a in content["annotations"]
        ]
    (root / "annotations" / "instances_train.json").write_text(json.dumps(many))
    job = training(root, tmp_path / "run", kind, batch_size=8, lr=1e-3, short_side=64, **FITTING[kind])
    job.run()
    assert job.rows[-1]["loss"] < job.rows[0]["loss"] / 4
    assert max(row["AP50"] for row in job.rows) >= 95


@pytest.mark.parametrize("kind", NAMES)
def test_photos_of_a_pixel_without_objects_and_unreadable(kind, tmp_path, capsys):
    sizes = {
        "pixel.png": (1, 1),
        "other.png": (9, 9),
        "long.png": (200, 1),
        "no.png": (5, 5),
        "empty.png": (40, 30),
    }
    images = [
        dict(id=i, file_name=name, width=width, height=height)
        for i, (name, (width, height)) in enumerate(sizes.items())
    ]
    boxes = [dict(id=1, image_id=0, category_id=1, bbox=[0, 0, 1, 1])]
    for split in ("train", "validation"):
        a_set(tmp_path, name=split, images=images, annotations=boxes)
        for name, size in sizes.items():
            Image.new("RGB", (8, 9) if name == "other.png" else size).save(tmp_path / split / name)
        (tmp_path / split / "no.png").write_bytes(b"no image")
    job = training(tmp_path, tmp_path / "run", kind, epochs=1, batch_size=5, freeze_norms=True)
    job.run()
    assert np.isfinite(job.rows[0]["loss"]) and job.rows[0]["unreadable"] == 4
    said = capsys.readouterr().err
    assert "other.png: 8x9 pixels, where the annotations say 9x9" in said and "no.png" in said


def test_splits_of_other_categories(tmp_path):
    a_set(tmp_path)
    a_set(tmp_path, name="validation", categories=[dict(id=3, name="cow")])
    with pytest.raises(ValueError, match=r"same categories, got \['dog', 'cat'\] and \['cow'\]"):
        training(tmp_path, tmp_path / "run", "retinanet")


def test_a_classifiers_weights_are_the_backbones(folder, tmp_path):
    classifier = create_model("mobile_former_26m")
    torch.save(classifier.state_dict(), tmp_path / "weights.pt")
    recipe = load_detection_recipe("digits_retinanet", **SMALL)
    job = DetectionTraining(recipe, folder, tmp_path / "run", ALONE, weights=tmp_path / "weights.pt")
    ours = job.network.backbone.network.state_dict()
    assert ours and all(torch.equal(value, classifier.state_dict()[name]) for name, value in ours.items())


def test_images_keep_their_size_in_training_and_in_evaluation(folder, tmp_path):
    """torchvision's own transform would bring them to 800 pixels."""
    job = training(folder, tmp_path / "run", "retinanet", epochs=1, short_side=40)
    shapes = set()
    job.network.backbone.register_forward_pre_hook(
        lambda _, x: shapes.add((job.network.training, x[0].shape[2:]))
    )
    job.run()
    assert shapes == {(True, (64, 64)), (False, (64, 64))}  # 40, padded to a multiple of 32


@pytest.mark.parametrize("kind", NAMES)
def test_norms_of_the_backbone_are_frozen_or_learn(kind, folder, tmp_path):
    def statistics(freeze: bool) -> torch.Tensor:
        job = training(folder, tmp_path / str(freeze), kind, epochs=1, freeze_norms=freeze)
        job.run()
        return job.network.backbone.network.stem[1].running_mean

    assert statistics(True).abs().max() == 0 < statistics(False).abs().max()


@pytest.mark.parametrize("kind", NAMES)
def test_training_in_bfloat16(kind, folder, tmp_path):
    job = training(folder, tmp_path, kind, epochs=1, batch_size=8, dtype="bfloat16")
    job.run()
    whole = training(folder, tmp_path / "whole", kind, epochs=1, batch_size=8)
    whole.run()
    assert job.rows[0]["loss"] == pytest.approx(whole.rows[0]["loss"], rel=0.05)
    assert job.rows[0]["loss"] != whole.rows[0]["loss"]


def test_blocks_are_frozen_as_dmfs_paper_counts():
    recipe = load_detection_recipe("retinanet_dmf_xxs")
    with torch.device("meta"):
        network = detectors.create_detector(recipe, 80).train()
    learned = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert learned == 19_350_036 - 1_982_136
    in_training = [block.norm.training for block in network.backbone.network.blocks]
    assert in_training == [False] * 4 + [True] * (len(in_training) - 4)


def test_the_command(folder, tmp_path, capsys):
    assert command.main(["recipes"]) == 0
    assert {"dmf_s", "e2e_mobile_former_294m"} <= set(capsys.readouterr().out.split())
    assert command.main(["digits-on-photos", str(tmp_path / "set"), "--train", "2", "--validation", "2"]) == 0
    assert "digits on images" in capsys.readouterr().out
    settings = ["--epochs", "1", "--batch-size", "4", "--workers", "0", "--short-side", "64"]
    output = ["--output", str(tmp_path / "run")]
    given = ["detection", str(folder), "--recipe", "digits_retinanet", *settings, *output]
    assert command.main(given) == 0
    assert "AP50" in capsys.readouterr().err
    model = mfkernels.detection.retinanet("mobile_former_26m", num_classes=10)
    mfkernels.models.load_released(model, torch.load(tmp_path / "run" / "best.pt"))
    assert command.main(["detection", str(tmp_path), "--recipe", "digits_retinanet"]) == 1
    assert "no annotations of the split 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", NAMES)
def test_two_processes_give_one_evaluation(kind, folder, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mfkernels.train"]
    settings = ["--epochs", "1", "--batch-size", "4", "--workers", "0", "--short-side", "64"]
    given = ["detection", str(folder), "--recipe", NAMES[kind], "--output", str(tmp_path), *settings]
    root = str(Path(mfkernels.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, *given], env=environment, check=True, timeout=600)
    header, row = (tmp_path / "history.csv").read_text().splitlines()
    values = dict(zip(header.split(","), map(float, row.split(",")), strict=True))
    assert np.isfinite(list(values.values())).all()
    # What one process says of the same weights.
    recipe = load_detection_recipe(tmp_path / "recipe.yaml")
    own = DetectionTraining(recipe, folder, tmp_path / "again", ALONE)
    if kind == "end_to_end":
        own.network.detector = create_model(recipe.model, num_classes=10, queries=recipe.queries)
    mfkernels.models.load_released(own.network.detector, torch.load(tmp_path / "best.pt"))
    for name, value in own._evaluate().items():
        assert value == pytest.approx(values[name], abs=0.01)
