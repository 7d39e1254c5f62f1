"""What the plans of all networks begin with."""

from collections.abc import Collection, Iterable

from torch import nn

from .packing import Formats, Packer


class Planner:
    """Packs weights, and refuses what a plan cannot say by the names of the parts in `model`."""

    def __init__(self, model: nn.Module, formats: Formats) -> None:
        self.pack = Packer(formats)
        self.names = {module: name for name, module in model.named_modules()}

    def refuse(self, module: nn.Module, why: str) -> ValueError:
        return ValueError(f"deploy: {self.names[module] or 'the model'} ({type(module).__name__}): {why}")

    def need(self, condition: bool, module: nn.Module, what: str) -> None:
        if not condition:
            raise self.refuse(module, f"only {what} can be deployed")

    def check_parts(
        self, known: Collection[type[nn.Module]], modules: Iterable[nn.Module] | None = None
    ) -> None:
        """All modules must be of the known classes, or compute as these do, and without hooks."""
        for module in self.names if modules is None else modules:
            if not any(isinstance(module, kind) and type(module).forward is kind.forward for kind in known):
                raise self.refuse(module, "unknown to deploy")
            self.check_settings(module)

    def check_settings(self, module: nn.Module) -> None:
        """Check that a module has settings that a plan can say, and no hooks."""
        if isinstance(module, nn.Conv2d):
            plain = module.dilation == (1, 1) and module.padding_mode == "zeros"
            self.need(plain, module, "convolutions without dilation and padded with zeros")
        if isinstance(module, nn.GELU):
            self.need(module.approximate == "none", module, "a GELU that is not approximate")
        if module._forward_hooks or module._forward_pre_hooks:
            raise self.refuse(module, "has a forward hook, which deploy would leave out")
