"""The command `python -m mfkernels.train`, alone or under `torchrun`."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    """Run the command; `arguments` are those of the command line by default. Returns the exit status."""
    try:
        import timm  # noqa: F401
        import torchvision  # noqa: F401

        from . import detection_recipe, digits, digits_on_photos, recipe
    except ModuleNotFoundError as error:
        print(f"mfkernels.train needs {error.name}: type `pip install 'mfkernels[train]'`", file=sys.stderr)
        return 1
    parser = argparse.ArgumentParser(prog="python -m mfkernels.train", description=__doc__)
    jobs = parser.add_subparsers(dest="job", required=True)
    train = jobs.add_parser("classification", help="train a network for classification by a recipe")
    train.add_argument("data", help="a folder with train/CLASS/... and validation/CLASS/..., or tar files")
    train.add_argument("--dataset", default="", help="hfds/NAME for one of Hugging Face; DATA has its copy")
    train.add_argument("--keys", default="image,label", help="its columns of the images and of the classes")
    train.add_argument("--num-classes", type=int, help="default: the folders")
    train.add_argument("--teacher-weights", type=Path, help="of the recipe's teacher (default: timm's)")
    _add_common(train, recipe.Recipe)
    detect = jobs.add_parser("detection", help="train a detector by a recipe")
    detect.add_argument("data", help="COCO's format: annotations/instances_SPLIT.json and images in SPLIT/")
    _add_common(detect, detection_recipe.DetectionRecipe)
    jobs.add_parser("recipes", help="list the recipes by name")
    make = jobs.add_parser("digits", help="write scikit-learn's digits as a folder of images to train on")
    make.add_argument("folder", type=Path)
    place = jobs.add_parser("digits-on-photos", help="write photographs with digits to train detection on")
    place.add_argument("folder", type=Path)
    place.add_argument("--train", type=int, default=2000, help="images")
    place.add_argument("--validation", type=int, default=400, help="images")
    place.add_argument("--side", type=int, default=128, help="of the images in pixels")
    options = parser.parse_args(arguments)
    try:
        if options.job == "recipes":
            print("\n".join(recipe.list_recipes() + detection_recipe.list_detection_recipes()))
        elif options.job == "digits":
            print(f"{digits.write(options.folder)} images in {options.folder}")
        elif options.job == "digits-on-photos":
            sizes = (options.train, options.validation, options.side)
            print(f"{digits_on_photos.write(options.folder, *sizes)} digits on images in {options.folder}")
        else:
            _train(options)
    except (FloatingPointError, OSError, TypeError, ValueError) as error:
        print(f"mfkernels.train: {error}", file=sys.stderr, flush=True)
        return 1
    except ModuleNotFoundError as error:
        print(f"mfkernels.train needs {error.name}: type `pip install 'mfkernels[train]'`", file=sys.stderr)
        return 1
    return 0


def _add_common(job: argparse.ArgumentParser, recipe: Any) -> None:
    """Add the arguments of all trainings, and one for each setting of the recipe."""
    job.add_argument("--recipe", required=True, help="a name (see `recipes`), or a .yaml file")
    job.add_argument("--output", type=Path, help="folder of the results (default: runs/RECIPE)")
    job.add_argument("--splits", default="train,validation", help="of training and of evaluation")
    job.add_argument("--weights", type=Path, help="weights to begin with; in detection, of the backbone")
    job.add_argument("--save-minutes", type=float, default=10.0, help="between checkpoints")
    job.add_argument("--keep", type=int, default=3, help="checkpoints that stay")
    settings = job.add_argument_group("settings that replace those of the recipe")
    for field in fields(recipe):
        settings.add_argument(f"--{field.name.replace('_', '-')}", dest=f"set_{field.name}", metavar="VALUE")


def _train(options: argparse.Namespace) -> None:
    from .processes import processes

    given = {name[4:]: value for name, value in vars(options).items() if name.startswith("set_")}
    changes = {name: _value(value) for name, value in given.items() if value is not None}
    splits = _pair("splits", options.splits)
    output = options.output or Path("runs") / Path(options.recipe).stem
    common: dict[str, Any] = dict(
        splits=splits, weights=options.weights, save_minutes=options.save_minutes, keep=options.keep
    )
    with processes() as own:
        if options.job == "detection":
            from .detection import DetectionTraining
            from .detection_recipe import load_detection_recipe

            detection_recipe = load_detection_recipe(options.recipe, **changes)
            DetectionTraining(detection_recipe, options.data, output, own, **common).run()
            return
        from .classification import Training
        from .recipe import load_recipe

        Training(
            load_recipe(options.recipe, **changes),
            options.data,
            output,
            own,
            dataset=options.dataset,
            keys=_pair("keys", options.keys),
            num_classes=options.num_classes,
            teacher_weights=options.teacher_weights,
            **common,
        ).run()


def _pair(name: str, text: str) -> tuple[str, str]:
    parts = text.split(",")
    if len(parts) != 2:
        raise ValueError(f"{name} must be two names with a comma between, got {text!r}")
    return parts[0], parts[1]


def _value(text: str) -> Any:
    """Return a setting as YAML has it, but numbers like 1e-3, too, and lists by commas."""
    import yaml

    if "," in text and not text.startswith("["):
        return [_value(part) for part in text.split(",")]
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


if __name__ == "__main__":
    sys.exit(main())
