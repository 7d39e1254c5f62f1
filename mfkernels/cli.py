"""The command `mfkernels`."""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__, models
from .backends import BACKENDS
from .models import mobile_former


def main(arguments: list[str] | None = None) -> int:
    """Run the command; `arguments` are those of the command line by default. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="mfkernels", description="Fused kernels for Mobile-Former, DMF and iFormer in PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"mfkernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print versions, machine and backends, for a bug report")
    demo = commands.add_parser("demo", help="run a network on a photo, plain PyTorch against mfkernels")
    demo.add_argument("--model", default="mobile_former_214m", choices=mobile_former.NAMES, metavar="NAME")
    demo.add_argument("--image", type=Path, help="a photo (default: the sample photo that matplotlib ships)")
    demo.add_argument("--checkpoint", type=Path, help="released weights (default: random weights)")
    demo.add_argument("--output", type=Path, default=Path("demo-output"), help="folder of the results")
    detect = commands.add_parser("detect", help="draw and write the objects that a detector finds in a photo")
    detect.add_argument("photo", type=Path, metavar="PHOTO")
    detect.add_argument(
        "--model", default="e2e_mobile_former_508m", choices=models.list_detectors(), metavar="NAME"
    )
    detect.add_argument("--checkpoint", type=Path, help="weights of a trained detector (default: random)")
    detect.add_argument("--threshold", type=float, default=0.5, help="of the scores, 0 to 1")
    detect.add_argument("--output", type=Path, default=Path("detect-output"), help="folder of the results")
    look = commands.add_parser("attention", help="draw where a network looks in a photo")
    look.add_argument("photo", type=Path, metavar="PHOTO")
    whole = [name for name in models.list_models() if not name.endswith("_faster")]  # without windows
    look.add_argument("--model", default="mobile_former_294m", choices=whole, metavar="NAME")
    look.add_argument("--checkpoint", type=Path, help="released weights (default: random weights)")
    look.add_argument("--output", type=Path, default=Path("attention-output"), help="folder of the figures")
    bench = commands.add_parser("bench", help="time networks against other runtimes and other networks")
    bench.add_argument("--networks", default="mobile_former_214m,mobilenet_v3_large", metavar="A,B,...")
    bench.add_argument("--runtimes", metavar="A,B,...", help="default: all that are installed")
    bench.add_argument("--sizes", default="224", metavar="N,...", help="image sides in pixels")
    bench.add_argument("--batch", type=int, default=1)
    bench.add_argument("--threads", type=int, default=1)
    bench.add_argument("--dtype", default="float32", metavar="A,B,...", help="float32, bfloat16, int8")
    bench.add_argument("--seconds", type=float, default=5.0, help="for each network in a runtime at a size")
    bench.add_argument("--profile", action="store_true", help="instead: where the time of our networks goes")
    bench.add_argument("--output", type=Path, default=Path("bench-output"), help="folder of the results")
    bench.add_argument("--all", action="store_true", help="instead: all that the documentation's tables need")
    bench.add_argument("--report", action="store_true", help="instead: write the documentation's tables")
    check = commands.add_parser("verify", help="compare a fast network with a plain one, block by block")
    check.add_argument("model", choices=models.list_models(), metavar="MODEL")
    check.add_argument("--checkpoint", type=Path, help="released weights (default: random weights)")
    check.add_argument("--image", type=Path, help="a photo beside the random images")
    check.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="int8 is deployed, calibrated with the inputs",
    )
    check.add_argument("--backend", choices=BACKENDS, default="auto", help="of the fast network")
    check.add_argument("--deploy", action="store_true", help="the fast network is the deployed one")
    judge = commands.add_parser("evaluate", help="accuracy and speed on a folder of photos, deployed and not")
    judge.add_argument("data", help="a folder with validation/CLASS/..., see `python -m mfkernels.train`")
    judge.add_argument("--model", required=True, choices=models.list_models(), metavar="MODEL")
    judge.add_argument("--checkpoint", required=True, type=Path, help="weights, of as many classes")
    judge.add_argument("--split", default="validation")
    judge.add_argument("--size", type=int, default=224, help="image side in pixels")
    judge.add_argument("--batch", type=int, default=16)
    judge.add_argument("--dtype", choices=("float32", "bfloat16", "int8"), default="float32", help="deployed")
    options = parser.parse_args(arguments)
    if options.command == "info":
        from .info import report

        print(report())
        return 0
    if options.command == "bench":
        from .bench import command

        try:
            command.run(options)
        except (OSError, ValueError) as error:
            parser.exit(1, f"mfkernels bench: {error}\n")
        return 0
    if options.command == "evaluate":
        try:
            from .train.evaluation import report as accuracies

            print(
                accuracies(
                    options.data,
                    options.model,
                    options.checkpoint,
                    split=options.split,
                    size=options.size,
                    batch=options.batch,
                    dtype=getattr(torch, options.dtype),
                )
            )
        except ModuleNotFoundError as error:
            parser.exit(1, f"mfkernels evaluate needs {error.name}: type `pip install 'mfkernels[train]'`\n")
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            parser.exit(1, f"mfkernels evaluate: {error}\n")
        return 0
    if options.command == "verify":
        try:
            return _verify(options)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            parser.exit(1, f"mfkernels verify: {error}\n")
    try:
        if options.command == "detect":
            from . import detect as detection

            detection.run(options.model, options.photo, options.checkpoint, options.threshold, options.output)
        elif options.command == "attention":
            from . import attention_figures

            attention_figures.run(options.model, options.photo, options.checkpoint, options.output)
        else:
            from . import demo as job

            job.run(options.model, options.image, options.checkpoint, options.output)
    except ModuleNotFoundError as error:
        parser.exit(
            1, f"mfkernels {options.command} needs {error.name}: type `pip install 'mfkernels[demo]'`\n"
        )
    except (OSError, ValueError) as error:
        parser.exit(1, f"mfkernels {options.command}: {error}\n")
    return 0


def _verify(options: argparse.Namespace) -> int:
    """Exit status 1 if an error is more than twice that of the plain network."""
    from .bench.run import randomise
    from .deploy import deploy
    from .verification import verify

    dtype = getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 3, size, size, generator=generator) for size in (224, 224, 160, 256)]
    model = models.create_model(options.model, checkpoint=options.checkpoint)
    if options.checkpoint is None:
        randomise(model)
    if options.image is not None:
        from .demo import open_photo, prepare

        inputs.append(prepare(open_photo(options.image), 224))
    plain = model.eval()
    if dtype == torch.int8:
        return _verify_int8(options.model, plain, inputs)
    fast = deploy(plain, dtype=dtype) if options.deploy else copy.deepcopy(plain).to(dtype)
    result = verify(plain, fast, inputs, dtype=dtype, backend=options.backend)
    weights = options.checkpoint or "random weights"
    print(f"{options.model}, {weights}, {options.dtype}, {'deployed' if options.deploy else options.backend}")
    print(result)
    return 0 if result.passed else 1


def _verify_int8(name: str, plain: nn.Module, inputs: list[Tensor]) -> int:
    """Exit status 1 if the results are further from those in float32 than `deploy` promises."""
    from .deploy import deploy
    from .deploy.cpu.int8 import BUDGET

    fast: Any = deploy(plain, dtype=torch.int8, calibration=inputs)
    with torch.inference_mode():
        same = sum(int((fast(x).argmax(1) == plain(x).argmax(1)).sum()) for x in inputs)
    print(f"{name}, int8, deployed; errors are of the logits, root mean square, over their deviation")
    print(fast.report(inputs[0]))
    print(f"the same class for {same} of {len(inputs)} images; error {fast.error:.1e}, allowed {BUDGET:.1e}")
    return 0 if fast.error <= BUDGET else 1
