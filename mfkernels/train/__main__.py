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

        from . import digits, recipe
    except ModuleNotFoundError as error:
        print(f"mfkernels.train needs {error.name}: type `pip install 'mfkernels[train]'`", file=sys.stderr)
        return 1
    parser = argparse.ArgumentParser(prog="python -m mfkernels.train", description=__doc__)
    jobs = parser.add_subparsers(dest="job", required=True)
    train = jobs.add_parser("classification", help="train a network for classification by a recipe")
    train.add_argument("data", help="a folder with train/CLASS/... and validation/CLASS/..., or tar files")
    train.add_argument("--recipe", required=True, help="a name (see `recipes`), or a .yaml file")
    train.add_argument("--output", type=Path, help="folder of the results (default: runs/RECIPE)")
    train.add_argument("--dataset", default="", help="timm's name of it, for example hfds/NAME")
    train.add_argument("--splits", default="train,validation", help="of training and of evaluation")
    train.add_argument("--num-classes", type=int, help="default: the folders")
    train.add_argument("--weights", type=Path, help="weights to begin with")
    train.add_argument("--teacher-weights", type=Path, help="of the recipe's teacher (default: timm's)")
    train.add_argument("--save-minutes", type=float, default=10.0, help="between checkpoints")
    train.add_argument("--keep", type=int, default=3, help="checkpoints that stay")
    settings = train.add_argument_group("settings that replace those of the recipe")
    for field in fields(recipe.Recipe):
        settings.add_argument(f"--{field.name.replace('_', '-')}", dest=f"set_{field.name}", metavar="VALUE")
    jobs.add_parser("recipes", help="list the recipes by name")
    make = jobs.add_parser("digits", help="write scikit-learn's digits as a folder of images to train on")
    make.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    if options.job == "recipes":
        print("\n".join(recipe.list_recipes()))
        return 0
    if options.job == "digits":
        print(f"{digits.write(options.folder)} images in {options.folder}")
        return 0
    try:
        _classification(options)
    except (FloatingPointError, OSError, TypeError, ValueError) as error:
        print(f"mfkernels.train: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _classification(options: argparse.Namespace) -> None:
    from .classification import Training
    from .processes import processes
    from .recipe import load_recipe

    given = {name[4:]: value for name, value in vars(options).items() if name.startswith("set_")}
    recipe = load_recipe(
        options.recipe, **{name: _value(value) for name, value in given.items() if value is not None}
    )
    splits = tuple(options.splits.split(","))
    if len(splits) != 2:
        raise ValueError(f"splits must be two names with a comma between, got {options.splits!r}")
    output = options.output or Path("runs") / Path(options.recipe).stem
    with processes() as own:
        Training(
            recipe,
            options.data,
            output,
            own,
            dataset=options.dataset,
            splits=splits,
            num_classes=options.num_classes,
            weights=options.weights,
            teacher_weights=options.teacher_weights,
            save_minutes=options.save_minutes,
            keep=options.keep,
        ).run()


def _value(text: str) -> Any:
    """A setting as YAML has it, but numbers like 1e-3, too, and lists by commas."""
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
