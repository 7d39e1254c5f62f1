"""Recipes: the settings of a training, by name from `recipes/*.yaml` or from a file of somebody's own."""

import difflib
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a training for classification.

    The papers' settings come first; how it is computed, which should not change what is learned, comes last.
    A batch is that of a step: of all processes and of all parts that are accumulated.
    """

    model: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup_epochs: float = 0.0  # linear, of the learning rate
    warmup_lr: float = 0.0  # with which it begins
    min_lr: float = 0.0  # with which the cosine ends
    optimizer: str = "adamw"  # any of timm's; biases and parameters with one dimension are not decayed
    clip_grad: float | None = None  # largest norm of all gradients together
    dropout: float | None = None  # None leaves the network's own
    drop_path: float | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0  # parameter of the beta distribution; 0 for none
    cutmix: float = 0.0  # if both are set, each batch has one of the two
    auto_augment: str | None = None  # as timm writes it
    color_jitter: float = 0.0
    random_erase: float = 0.0  # probability
    hflip: float = 0.5  # probability
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the photo's area that a training image shows
    image_size: int = 224
    train_sizes: tuple[int, ...] = ()  # sizes of which each step takes one; image_size if there are none
    crop_fraction: float = 0.875  # of the resized photo's side, in evaluation
    interpolation: str = "bicubic"
    ema_decay: float | None = None  # the averaged weights are then the ones that are evaluated
    temperature: float = 1.0  # of DMF's kernel scores in the beginning; it ends with 1
    temperature_epochs: int = 10
    distillation: float = 0.0  # share of the teacher's loss; above 0 the network has a second head for it
    teacher: str | None = None  # one of timm's networks
    seed: int = 0
    dtype: str = "float32"  # "bfloat16" for autocast
    accumulation: int = 1  # parts into which a process divides its share of a batch
    sync_bn: bool = False  # batch norm over all processes; GPUs only
    channels_last: bool = False
    checkpoint_activations: bool = False
    compile: bool = False
    workers: int = 4  # processes that read images, for each process that trains

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            TypeError, ValueError: a value that does not fit, named.
        """
        for name in ("epochs", "batch_size", "accumulation", "image_size"):
            check_number(name, getattr(self, name), 1)
        for name in (
            "lr",
            "weight_decay",
            "warmup_epochs",
            "warmup_lr",
            "min_lr",
            "workers",
            "mixup",
            "cutmix",
        ):
            check_number(name, getattr(self, name), 0)
        for name in ("label_smoothing", "random_erase", "hflip", "distillation"):
            check_number(name, getattr(self, name), 0, 1)
        for name in ("dropout", "drop_path", "ema_decay"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0, 1)
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"recipe: dtype must be 'float32' or 'bfloat16', got {self.dtype!r}")
        if self.distillation and not self.teacher:
            raise ValueError(f"recipe: distillation {self.distillation} needs a teacher, got none")
        for size in self.train_sizes:
            check_number("train_sizes", size, 1)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the training images, in pixels."""
        return self.train_sizes or (self.image_size,)


# What does not change which numbers a training should give, up to rounding.
COMPUTING = (
    "dtype",
    "accumulation",
    "channels_last",
    "checkpoint_activations",
    "compile",
    "workers",
)


def list_recipes() -> list[str]:
    """Return the names that `load_recipe` knows."""
    return list(_recipes())


def load_recipe(name: str | Path, **changes: Any) -> Recipe:
    """Return a recipe with some of its settings changed.

    Args:
        name: one of `list_recipes()`, or the path of a YAML file with the settings, such as the `recipe.yaml`
            that a training leaves in its folder.
        **changes: settings that replace the recipe's.

    Raises:
        ValueError: an unknown name, setting or value.
        FileNotFoundError: no such file.
    """
    return resolve(Recipe, _recipes(), name, changes)


def resolve(kind: Any, recipes: dict[str, dict[str, Any]], name: str | Path, changes: dict[str, Any]) -> Any:
    """Return a recipe, a dataclass `kind`, by its name in `recipes` or from a file; see `load_recipe`."""
    if str(name) in recipes:
        settings: Any = dict(recipes[str(name)])
    elif Path(name).suffix in (".yaml", ".yml"):
        settings = yaml.safe_load(Path(name).read_text())
        if not isinstance(settings, dict):
            raise ValueError(f"recipe: {name} must hold settings by name, got {type(settings).__name__}")
    else:
        near = difflib.get_close_matches(str(name), recipes, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"recipe: must be one of {', '.join(recipes)} or a .yaml file, got {name!r}{hint}")
    settings |= changes
    known = {field.name: field for field in fields(kind)}
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"recipe: unknown settings {', '.join(unknown)}; known are {', '.join(known)}")
    missing = [key for key, field in known.items() if field.default is MISSING and key not in settings]
    if missing:
        raise ValueError(f"recipe: {name} lacks {', '.join(missing)}")
    for key in settings:
        if isinstance(settings[key], list):
            settings[key] = tuple(settings[key])
    return kind(**settings)


def save_recipe(recipe: Any, path: Path) -> None:
    """Write all settings of a recipe as YAML, in their order."""
    settings = {
        key: list(value) if isinstance(value, tuple) else value for key, value in asdict(recipe).items()
    }
    path.write_text(yaml.safe_dump(settings, sort_keys=False))


def differences(one: Any, other: Any) -> list[str]:
    """Return the names of settings that differ and matter to what is learned."""
    a, b = asdict(one), asdict(other)
    return [name for name in a if name not in COMPUTING and a[name] != b[name]]


def tables(*families: str) -> dict[str, dict[str, Any]]:
    """Return the settings of the recipes in some files by name.

    Each recipe's settings are its file's "all", and then its own.
    """
    recipes: dict[str, dict[str, Any]] = {}
    for family in families:
        table = yaml.safe_load((_FOLDER / f"{family}.yaml").read_text())
        common = table.pop("all")
        recipes |= {name: {"model": name, **common, **own} for name, own in table.items()}
    return recipes


@cache
def _recipes() -> dict[str, dict[str, Any]]:
    return tables("mobile_former", "dynamic_mobile_former", "iformer", "digits")


def check_number(name: str, value: Any, least: float, most: float = float("inf")) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"recipe: {name} must be a number, got {value!r}")
    if not least <= value <= most:
        limit = f"at least {least}" if most == float("inf") else f"from {least} to {most}"
        raise ValueError(f"recipe: {name} must be {limit}, got {value}")
