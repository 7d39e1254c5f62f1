"""Plans for people."""

from typing import Any, NamedTuple

from . import steps
from .steps import ACTIVATIONS, GATINGS, RESAMPLINGS, SIZES, Linear


class _Shape(NamedTuple):
    """Of a map: so many windows, one after the other, or one map."""

    windows: int
    height: int
    width: int

    def pixels(self) -> int:
        return self.windows * self.height * self.width


def description(plan: list[int], parts: list[str], side: int) -> str:
    """Return a line for each step of a plan.

    It has the step's part of the network, its kind, its result, the bytes of weights that it reads, and its
    floating-point operations for an image of side x side, with those on the padding of channels.
    """
    header, layers, made = steps.parsed(plan)
    maps = {-1: _Shape(1, side, side)}
    cut: list[_Shape] = []  # what was cut into windows, the latest last
    rows = []
    for part, (kind, fields) in zip(parts, made, strict=False):  # parts of the linear layers follow
        if kind == "split":
            cut.append(maps[fields.input])
        shape = cut.pop() if kind == "join" else _made(kind, fields, maps)
        if hasattr(fields, "out"):
            maps[fields.out.map] = shape
        operations, floats = _cost(kind, fields, shape, header)
        rows.append([part, kind, _what(kind, fields, shape, header), _bytes(floats), _operations(operations)])
    for part, (activation, linear) in zip(parts[header.steps :], layers, strict=True):
        what = f"{linear.inputs} -> {linear.outputs}{_then(activation)}{_stored(header)}"
        floats = _row_size(linear, header)
        rows.append([part, "linear", what, _bytes(floats), _operations(2 * linear.inputs * linear.outputs)])
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    justify = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust)
    return "\n".join(
        "  ".join(f(cell, width) for f, cell, width in zip(justify, row, widths, strict=True)).rstrip()
        for row in rows
    )


def _made(kind: str, fields: Any, maps: dict[int, _Shape]) -> _Shape:
    """Return the map that a step writes, or reads where it writes none."""
    if kind == "state_rows":
        return _Shape(1, fields.rows, 1)
    shape = maps[getattr(fields, "input", -1)]
    if kind == "resize":
        sizes = {"image": maps[-1], "twice": _Shape(1, 2 * shape.height, 2 * shape.width)}
        sizes["half"] = _Shape(1, -(-shape.height // 2), -(-shape.width // 2))
        named = {number: sizes[name] for name, number in SIZES.items()}
        return named[fields.like] if fields.like < 0 else maps[fields.like]
    if kind == "split":
        window = fields.window
        windows = -(-shape.height // window) * -(-shape.width // window)
        return _Shape(shape.windows * windows, window, window)
    if hasattr(fields, "padding"):
        margin = steps.margin(fields.kernel, fields.stride, fields.padding)
        height, width = ((side + margin) // fields.stride for side in (shape.height, shape.width))
        return _Shape(shape.windows, height, width)
    stride = getattr(fields, "stride", 1) if hasattr(fields, "out") else 1
    return _Shape(shape.windows, -(-shape.height // stride), -(-shape.width // stride))


def _what(kind: str, fields: Any, shape: _Shape, header: steps.Header) -> str:
    if hasattr(fields, "out"):
        out = fields.out
        number = f"{shape.windows} x " if shape.windows > 1 else ""
        source = "rows" if kind == "state_rows" else "image"
        text = f"map {fields.input} -> " if fields.input >= 0 else f"{source} -> "
        text += f"map {out.map}: {number}{out.channels} x {shape.height} x {shape.width}"
        text += f", {fields.kernel}x{fields.kernel}" if getattr(fields, "kernel", 0) else ""
        text += _then(getattr(fields, "activation", 0))
        text += ", int8" if any(linear.scale for linear in _linears(fields)) else ""
        text += f", weights of {fields.tokens} tokens" if kind == "weigh" else ""
        text += f", mixed by map {fields.attention}" if getattr(fields, "attention", -1) >= 0 else ""
        text += f", of {fields.tokens} tokens" if kind == "spread" else ""
        text += f", {GATINGS[fields.gating]}" if kind == "attention" else ""
        text += f", {RESAMPLINGS[fields.resampling]}" if kind == "resize" else ""
        text += ", the larger" if getattr(fields, "maximum", 0) else ""
        text += ", from tokens" if out.scatter >= 0 else ""
        return text + (", to tokens" if out.gather >= 0 else "")
    if kind == "linear":
        return f"{_rows(fields)}{_then(fields.activation)}{_stored(header)}"
    if kind == "attend":
        return f"{fields.rows} rows, {fields.heads} heads of {fields.depth}"
    if kind == "slopes":
        return f"{_rows(fields)}{_stored(header)}"
    if kind == "pooled":
        return f"map {fields.input} -> {fields.linear.outputs}"
    if kind == "collect":
        return f"map {fields.input} -> {fields.tokens} x {fields.in_channels}"
    if kind == "hand_out":
        return f"map {fields.map}"
    counts = ("tokens", "rows", "width", "channels", "kernels", "blocks", "floats")
    text = ", ".join(f"{getattr(fields, name)} {name}" for name in counts if hasattr(fields, name))
    return text + (_stored(header) if kind == "kernels" else "")


def _rows(fields: Any) -> str:
    return f"{fields.rows} x {fields.linear.inputs} -> {fields.linear.outputs}"


def _stored(header: steps.Header) -> str:
    """Of a linear layer over rows: as what its weights are stored, where they are narrow."""
    return ("", ", int8", ", bfloat16")[header.narrow]


def _cost(kind: str, fields: Any, shape: _Shape, header: steps.Header) -> tuple[int, int]:
    """Operations, and floats of weights."""
    linears = _linears(fields)
    groups = getattr(fields, "groups", 1)
    products = sum(linear.inputs * linear.outputs for linear in linears) // groups
    taps = _taps(kind, fields)
    bf16 = header.bf16
    over_rows = kind in ("linear", "slopes", "kernels")
    sizes = (_row_size(one, header) if over_rows else _size(one, bf16, groups) for one in linears)
    floats = sum(sizes) + taps
    if hasattr(fields, "out"):
        out = fields.out
        bridges = (out.scatter >= 0) + (out.gather >= 0)
        multiplied = products + taps + 2 * bridges * out.tokens * out.channels
        if kind == "attention":
            multiplied = shape.height * shape.width * fields.heads * (fields.depth + fields.channels)
        if kind == "weigh":
            multiplied = fields.in_channels * fields.tokens * fields.stride**2
        if kind == "spread":
            multiplied += fields.tokens * out.channels
            floats += fields.positions * (fields.tokens + 1)
        if getattr(fields, "attention", -1) >= 0:
            multiplied += 2 * fields.tokens * _activated(kind, fields)
        if getattr(fields, "mixed", 0):  # its weights are of the state
            floats = 0
        return 2 * shape.pixels() * multiplied, floats
    if kind == "mix":
        size = 16 * fields.blocks
        return 2 * size * fields.kernels, size * (fields.kernels + 1) // (2 if bf16 and fields.matrix else 1)
    if kind == "attend":
        return 4 * fields.rows**2 * fields.heads * fields.depth, 0
    if kind == "collect":
        tokens, positions = fields.tokens, fields.positions
        return 2 * tokens * positions * fields.in_channels, positions * (tokens + -tokens % 4) + tokens
    if kind == "copy":
        return 0, fields.floats if fields.weights else 0
    rows = shape.pixels() if kind == "pooled" else getattr(fields, "rows", 1)
    return 2 * rows * products, floats


def _linears(fields: Any) -> list[Linear]:
    return [field for field in fields if isinstance(field, Linear)]


def _taps(kind: str, fields: Any) -> int:
    if kind in ("depthwise", "inverted"):
        return fields.kernel**2 * fields.out.channels
    if kind in ("lite", "block", "dynamic_lite"):
        return 9 * fields.hidden
    return 9 * (fields.hidden1 + fields.hidden2) if kind == "down" else 0


def _activated(kind: str, fields: Any) -> int:
    """Channels whose slopes are mixed."""
    if kind == "block":
        return 2 * fields.hidden
    return fields.hidden1 + fields.hidden2 if kind == "down" else fields.out.channels


def _size(linear: Linear, bf16: int, groups: int = 1) -> int:
    shares = 4 if linear.scale else 2 if bf16 else 1  # of a float
    return linear.inputs * linear.outputs // groups // shares + linear.outputs * (3 if linear.scale else 1)


def _row_size(linear: Linear, header: steps.Header) -> int:
    if header.narrow == 0:
        return _size(linear, header.bf16)
    return linear.inputs * linear.outputs * header.narrow // 4 + 2 * linear.outputs


def _then(activation: int) -> str:
    return f", {ACTIVATIONS[activation]}" if activation else ""


def _bytes(floats: int) -> str:
    return f"{4 * floats / 1e3:.1f} kB" if floats else ""


def _operations(count: int) -> str:
    return f"{count / 1e6:.2f} MFLOP" if count else ""
