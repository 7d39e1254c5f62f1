"""The end-to-end detector: counts beside the paper's, padded batches, loss, training, results, errors."""

import copy
import itertools
import json

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import mfkernels
from mfkernels import cli
from mfkernels.boxes import corners, generalized_iou, postprocess
from mfkernels.models import (
    Detections,
    EndToEndMobileFormer,
    FeaturePyramid,
    MobileFormer,
    create_model,
    list_detectors,
)
from mfkernels.nn import DetectionBlock, MobileFormerDownsample, Padding, UpConv

pytest.importorskip("scipy")
from mfkernels.detection_loss import Weights, detection_loss, match

ROWS = [("D", 2, 8, 1, 1, 0), *(("D", 3, width, 1, 2, 2) for width in (12, 16, 24, 32))]


def small(**options) -> EndToEndMobileFormer:
    """A detector of two classes and two scales."""
    torch.manual_seed(0)
    token_id = -1 if options.pop("spatial", True) else 0
    network = MobileFormer(ROWS, stem_channels=8, token_dim=32, token_num=3, token_id=token_id)
    settings = dict(num_classes=2, queries=5, channels=32, num_heads=4, expansion=2, dropout=0.0) | options
    blocks = settings.pop("blocks", (2, 1))
    return EndToEndMobileFormer(FeaturePyramid(network), blocks, **settings)


def rectangles() -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Four images of 64 pixels with one or two bright rectangles; the label is the channel."""
    generator = torch.Generator().manual_seed(1)
    images, targets = torch.full((4, 3, 64, 64), -0.5), []
    for i in range(4):
        labels, boxes = [], []
        for k in range(1 + i % 2):
            width, height = torch.randint(14, 28, (2,), generator=generator).tolist()
            left = torch.randint(4, (1,), generator=generator).item() + 32 * k
            top = torch.randint(64 - height, (1,), generator=generator).item()
            labels.append((i + k) % 2)
            images[i, labels[-1], top : top + height, left : left + width] = 2.0
            boxes.append([(left + width / 2) / 64, (top + height / 2) / 64, width / 64, height / 64])
        targets.append(dict(labels=torch.tensor(labels), boxes=torch.tensor(boxes)))
    return images, targets


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """In float64 and eval mode, with linear layers and norms that are not what they begin as."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
    return model.double().eval()


# Parameters; multiply-adds at 800x1333 in 10^6, and those of the element-wise mixing of the spatial-aware
# dynamic ReLUs' coefficients, which come to it; the paper's millions and 10^9.
COUNTS = {
    "e2e_mobile_former_508m": (26_069_608, 42_268, 1_178, 26.3, 41.4),
    "e2e_mobile_former_294m": (24_635_952, 23_206, 860, 24.9, 24.1),
    "e2e_mobile_former_214m": (20_014_712, 17_596, 676, 20.1, 17.8),
    "e2e_mobile_former_151m": (14_895_788, 12_799, 538, 14.8, 12.7),
}


def counted(monkeypatch, name: str, **options) -> tuple[int, int, int]:
    """Parameters, multiply-adds in 10^6 without that mixing, and of that mixing."""
    with torch.device("meta"):
        model, image = create_model(name, **options).eval(), torch.empty(1, 3, 800, 1333)
    mixing = []

    def dynamic_relu(x, slopes, attention=None):
        if attention is not None:
            mixing.append(slopes[0].numel() * attention[0, 0].numel())
        return x

    monkeypatch.setattr(mfkernels.ops, "dynamic_relu", dynamic_relu)
    with mfkernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
        out = model(image)
    assert out.logits.shape == (1, 100, 92) and out.boxes.shape == (1, 100, 4)
    assert len(out.auxiliary) == sum(map(len, model.scales)) - 1
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, round(counter.get_total_flops() / 2e6), round(sum(mixing) / 1e6)


@pytest.mark.parametrize("name", list_detectors())
def test_counts(name, monkeypatch):
    parameters, operations, mixing, millions, billions = COUNTS[name]
    assert counted(monkeypatch, name) == (parameters, operations, mixing)
    assert abs(parameters / 1e6 / millions - 1) < 0.011
    assert abs(operations / 1e3 / billions - 1) < 0.043


def test_counts_without_attention_in_mobile(monkeypatch):
    """The paper: 23.7 million and 36.0 10^9, which is 2.6 and 5.4 less than with it."""
    name = "e2e_mobile_former_508m"
    parameters, operations, mixing = counted(monkeypatch, name, mobile_attention=False)
    assert (parameters, operations, mixing) == (23_434_088, 36_693, 1_178)
    assert abs((COUNTS[name][0] - parameters) / 1e6 - 2.6) < 0.05
    assert abs(operations / 1e3 / 36.0 - 1) < 0.043


def test_ablations_by_name():
    name, settings = "e2e_mobile_former_151m", dict(num_classes=3, queries=4, channels=32)
    x = torch.randn(1, 3, 64, 64)
    whole = create_model(name, **settings)
    assert whole(x).logits.shape == (1, 4, 4)
    assert whole.backbone.network.features[1].token_id == -1
    plain = create_model(name, spatial=False, **settings)
    assert plain.backbone.network.features[1].token_id == 0
    names = [key for key, _ in whole.named_parameters()]
    for option, part in (("adapt_position", "adapt_position"), ("mobile_attention", "pixel_block")):
        left = create_model(name, **{option: False}, **settings)
        assert [key for key, _ in left.named_parameters()] == [key for key in names if part not in key]
        assert any(part in key for key in names)
    single = create_model(name, scales=1, **settings)
    assert [key for key, _ in single.named_parameters()] == [
        key for key in names if not key.startswith(("up_convs", "scales.1"))
    ]
    assert len(single(x).auxiliary) == 2
    for model in (plain, single):
        assert torch.isfinite(model(x).boxes).all()


def test_a_classifiers_weights_fit_the_backbone():
    model = create_model("e2e_mobile_former_151m", queries=4, channels=32)
    classifier = create_model("mobile_former_151m", features_only=True)
    assert not model.backbone.load_state_dict(classifier.state_dict()).missing_keys


def padded(sizes: list[tuple[int, int]], fill: float = torch.nan) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images in one batch, `fill` around them, and the mask."""
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    images, mask = torch.full((len(sizes), 3, height, width), fill), torch.ones(len(sizes), height, width) > 0
    generator = torch.Generator().manual_seed(2)
    for i, (h, w) in enumerate(sizes):
        images[i, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        mask[i, :h, :w] = False
    return images.double(), mask


SIZES = [(99, 53), (61, 75), (33, 64), (1, 7)]


@pytest.mark.parametrize(
    "options",
    [{}, dict(spatial=False, mobile_first=False), dict(blocks=(1, 1, 1, 1), mobile_attention=False)],
)
def test_detections_of_an_image_are_the_same_in_every_batch(options):
    model = randomised(small(**options))
    images, mask = padded(SIZES)
    with torch.inference_mode():
        together = model(images, mask)
        for i, (height, width) in enumerate(SIZES):
            alone = model(images[i : i + 1, :, :height, :width])
            blocks = zip((together, *together.auxiliary), (alone, *alone.auxiliary), strict=True)
            for ours, theirs in blocks:
                torch.testing.assert_close(ours.logits[i : i + 1], theirs.logits, rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(ours.boxes[i : i + 1], theirs.boxes, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spatial", [True, False])
def test_padded_batches_attend_by_our_operator(spatial, monkeypatch):
    """As the definition does, gradients included."""
    attend, masks = mfkernels.ops.mobile_to_former_attention, []

    def note(x, q, num_heads, scale, return_logits, mask):
        masks.append(mask)
        return attend(x, q, num_heads, scale, return_logits, mask)

    monkeypatch.setattr(mfkernels.ops, "mobile_to_former_attention", note)
    images, mask = padded([(64, 20), (30, 64)])
    results = []
    for backend in ("cpu", "reference"):
        model = randomised(small(spatial=spatial)).train()
        with mfkernels.use_backend(backend):
            out = model(images, mask)
            (out.logits.square().sum() + out.boxes.sum()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([out.logits, out.boxes, *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    assert len(masks) == 2 * (4 + 3) and all(m.any() for m in masks)


def test_a_mask_without_padding_changes_nothing():
    """Nor in training, gradients and statistics included."""
    models = [randomised(small()).train() for _ in range(2)]
    images = torch.randn(2, 3, 67, 50, dtype=torch.float64)
    for model, mask in zip(models, (None, torch.zeros(2, 67, 50) > 0), strict=True):
        out = model(images, mask)
        (out.logits.square().sum() + out.boxes.sum()).backward()
    ours, theirs = ([*model.buffers(), *(p.grad for p in model.parameters())] for model in models)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_training_measures_the_images_pixels_alone():
    model = randomised(small(blocks=(1, 1))).train()
    images, mask = padded([(64, 32), (64, 32)])
    wider, wider_mask = (F.pad(value, (0, 64), value=1) for value in (images, mask))
    plain, wide = copy.deepcopy(model), copy.deepcopy(model)
    expected, got = plain(images), wide(wider, wider_mask)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-9, atol=1e-9)
    for one, other in zip(wide.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_padding_halves_each_image_by_its_own_bins():
    _, mask = padded([(13, 4), (5, 9), (8, 7), (1, 1)])
    x = torch.randn(4, 2, *mask.shape[1:], dtype=torch.float64)
    halves = Padding(mask).halve(x)
    for i, (height, width) in enumerate([(13, 4), (5, 9), (8, 7), (1, 1)]):
        size = (height + 1) // 2, (width + 1) // 2
        expected = F.adaptive_avg_pool2d(x[i : i + 1, :, :height, :width], size)
        torch.testing.assert_close(halves[i : i + 1, :, : size[0], : size[1]], expected)
        assert halves[i, :, size[0] :].abs().sum() == 0 and halves[i, :, :, size[1] :].abs().sum() == 0


def test_spatial_aware_coefficients_by_their_formula():
    """Equation 3 at every pixel of a block's first activation, with odd sizes, where bins overlap."""
    torch.manual_seed(0)
    block = MobileFormerDownsample(8, 6, 2, expansion=(2, 2), token_dim=12, token_num=3, token_id=-1)
    randomised(block)
    x, tokens = torch.randn(1, 8, 7, 5).double(), torch.randn(3, 1, 12).double()
    seen: dict = {}
    block.act1.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], y=output))
    new = block(x, tokens)[1]
    logits = block.local_global(x, tokens)[1][0].mean(0)  # (T, H, W)
    theta = block.hyper1.hyper(new)[:, 0]  # (T, 2C)
    for i in range(4):
        for j in range(3):
            rows = slice(i * 7 // 4, -(-(i + 1) * 7 // 4))
            columns = slice(j * 5 // 3, -(-(j + 1) * 5 // 3))
            weights = logits[:, rows, columns].mean((1, 2)).softmax(0)
            a, b = (weights @ theta).chunk(2)
            pixel = seen["x"][0, :, i, j]
            expected = torch.maximum((2 * (a - 0.5) + 1) * pixel, 2 * (b - 0.5) * pixel)
            torch.testing.assert_close(seen["y"][0, :, i, j], expected)


@pytest.mark.parametrize("mobile_first", [True, False])
def test_block_by_its_formula(mobile_first):
    torch.manual_seed(0)
    block = DetectionBlock(
        16, queries=5, expansion=2, num_heads=4, mobile_attention=True, mobile_first=mobile_first
    )
    randomised(block)
    x, queries, position = (torch.randn(s).double() for s in ((2, 16, 5, 3), (5, 2, 16), (5, 2, 16)))
    state = {key: value for key, value in block.state_dict().items()}

    def linear(z, key):
        return F.linear(z, state[f"{key}.weight"], state[f"{key}.bias"])

    def norm(z, key):
        return F.layer_norm(z, (16,), state[f"{key}.weight"], state[f"{key}.bias"])

    def attend(q, k, v, heads):  # (n, B, C) each
        out = []
        for one, other, value in zip(q.chunk(heads, 2), k.chunk(heads, 2), v.chunk(heads, 2), strict=True):
            scores = torch.einsum("nbc,mbc->bnm", one, other) / one.shape[2] ** 0.5
            out.append(torch.einsum("bnm,mbc->nbc", scores.softmax(2), value))
        return torch.cat(out, 2)

    def encode(z, p, key):
        weights, biases = (state[f"{key}.attention.in_proj_{part}"].chunk(3) for part in ("weight", "bias"))
        inputs = (z + p, z + p, z)
        q, k, v = (F.linear(i, w, b) for i, w, b in zip(inputs, weights, biases, strict=True))
        z = norm(z + linear(attend(q, k, v, 4), f"{key}.attention.out_proj"), f"{key}.layer_norm")
        return norm(z + linear(F.gelu(linear(z, f"{key}.ffn.0")), f"{key}.ffn.2"), f"{key}.ffn_norm")

    def convolve(z, key, padding, groups):
        z = F.conv2d(z, state[f"{key}.0.weight"], padding=padding, groups=groups)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(z, *(state[f"{key}.1.{name}"] for name in names))

    def as_pixels(z):
        return z.flatten(2).permute(2, 0, 1)

    def mobile(z, q):
        z = encode(as_pixels(z), 0.0, "pixel_block").permute(1, 2, 0).reshape(z.shape)
        hidden = convolve(z, "conv1", 1, 16)
        theta = F.hardsigmoid(linear(linear(q[0], "hyper.hyper.0").relu(), "hyper.hyper.2"))
        a, b = (2 * theta[..., None, None]).chunk(2, 1)
        z = z + convolve(torch.maximum(a * hidden, (b - 1) * hidden), "conv2", 0, 1)
        k, v = linear(q, "global_local.k"), linear(q, "global_local.proj")
        return z + attend(as_pixels(z), k, v, 2).permute(1, 2, 0).reshape(z.shape)

    def adapt(p, q):
        return p + linear(linear(q, "adapt_position.g.0").relu(), "adapt_position.g.2")

    def former(z, q, p):
        pixels = as_pixels(z)
        gathered = attend(linear(q + p, "local_global.q"), pixels, pixels, 2)
        gathered = gathered * 2 * F.hardsigmoid(linear(q, "local_global.alpha.0"))
        q = norm(q + linear(gathered, "local_global.proj"), "local_global.layer_norm")
        return encode(q, p, "global_block")

    with torch.no_grad():
        got = block(x, queries, position)
        if mobile_first:
            x, position = mobile(x, queries), adapt(position, queries)
            queries = former(x, queries, position)
        else:
            queries = former(x, queries, position)
            x, position = mobile(x, queries), adapt(position, queries)
    for ours, expected in zip(got, (x, queries, position), strict=True):
        torch.testing.assert_close(ours, expected)


def test_up_conv_keeps_a_constant():
    """Up to the border, next to which the padding's zeros are."""
    up = UpConv(3, 4).double().eval()
    up.conv1[0].weight.data = F.pad(torch.ones(4, 1, 1, 1), (1, 1, 1, 1)).double()
    up.conv2[0].weight.data = torch.eye(4)[..., None, None].double()
    _, mask = padded([(7, 9), (4, 5)])
    padding = Padding(mask)
    coarse, finer = torch.ones(2, 4, 4, 5).double(), torch.zeros(2, 3, 7, 9).double()
    got = up(padding.hide(coarse), finer, padding)
    expected = padding.hide((1 + up.lateral.bias)[:, None, None].expand(2, 4, 7, 9))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)  # norms divide by sqrt(1 + epsilon)


def outputs_and_targets(blocks: int = 3) -> tuple[Detections, list[dict[str, torch.Tensor]]]:
    """Random ones: three images, one without objects and one with more than half as many as queries."""
    generator = torch.Generator().manual_seed(3)

    def boxes(*shape):
        half = 0.05 + 0.2 * torch.rand(*shape, 2, generator=generator)
        return torch.cat([half + (1 - 2 * half) * torch.rand(*shape, 2, generator=generator), 2 * half], -1)

    found = [
        Detections(torch.randn(3, 7, 6, generator=generator).requires_grad_(), boxes(3, 7).requires_grad_())
        for _ in range(blocks)
    ]
    targets = [
        dict(labels=torch.randint(5, (count,), generator=generator), boxes=boxes(count))
        for count in (2, 0, 4)
    ]
    return found[-1]._replace(auxiliary=tuple(found[:-1])), targets


def test_overlap_of_known_boxes():
    unit = torch.tensor([0.0, 0.0, 1.0, 1.0])
    others = torch.tensor([[0.0, 0, 1, 1], [0, 0, 0.5, 1], [1, 0, 2, 1], [2, 0, 3, 1], [1, 1, 2, 2]])
    torch.testing.assert_close(generalized_iou(unit, others), torch.tensor([1, 0.5, 0, -1 / 3, -0.5]))
    torch.testing.assert_close(corners(torch.tensor([0.5, 0.25, 1, 0.5])), torch.tensor([0.0, 0, 1, 0.5]))


def test_matching_is_the_cheapest():
    outputs, targets = outputs_and_targets()
    for i, (queries, objects) in enumerate(match(outputs, targets)):
        count = len(targets[i]["labels"])
        assert sorted(objects.tolist()) == list(range(count))

        def cost(query, thing, i=i):
            box, other = outputs.boxes[i, query], targets[i]["boxes"][thing]
            probability = outputs.logits[i, query].softmax(0)[targets[i]["labels"][thing]]
            overlap = generalized_iou(corners(box), corners(other))
            return (5 * (box - other).abs().sum() - probability - 2 * overlap).item()

        costs = [[cost(q, t) for t in range(count)] for q in range(7)]
        best = min(
            sum(costs[q][t] for t, q in enumerate(choice))
            for choice in itertools.permutations(range(7), count)
        )
        ours = sum(costs[q][t] for q, t in zip(queries.tolist(), objects.tolist(), strict=True))
        assert ours == pytest.approx(best)


def test_loss_without_objects_and_by_many_processes(monkeypatch):
    outputs, targets = outputs_and_targets()
    none = [dict(labels=torch.zeros(0, dtype=torch.int64), boxes=torch.zeros(0, 4))] * 3
    empty = detection_loss(outputs, none)
    empty.total.backward()
    assert empty.l1 == empty.giou == 0 and empty.classes > 0
    assert outputs.logits.grad.isfinite().all() and outputs.boxes.grad.abs().max() == 0
    alone = detection_loss(outputs, targets)
    double = detection_loss(outputs, targets, Weights(classes=2, l1=10, giou=4))
    assert double.total.item() == pytest.approx(2 * alone.total.item())
    # Of two processes the other one has 12 objects; here are 6.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counted: counted.add_(12))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    shared = detection_loss(outputs, targets)
    assert shared.classes == alone.classes
    torch.testing.assert_close(torch.stack([shared.l1, shared.giou]) * 9, torch.stack(alone[2:]) * 6)


@pytest.mark.vision
def test_loss_is_transformers():
    pytest.importorskip("transformers")
    from transformers import DetrConfig
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss, HungarianMatcher

    outputs, targets = outputs_and_targets()
    renamed = [dict(class_labels=t["labels"], boxes=t["boxes"]) for t in targets]
    as_theirs = dict(logits=outputs.logits, pred_boxes=outputs.boxes)
    pairs = HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)(as_theirs, renamed)
    for ours, theirs in zip(match(outputs, targets), pairs, strict=True):
        assert all(map(torch.equal, ours, theirs))
    config = DetrConfig(auxiliary_loss=True, decoder_layers=3, num_labels=5)
    stacked = [
        torch.stack(part) for part in zip(*[b[:2] for b in (*outputs.auxiliary, outputs)], strict=True)
    ]
    total, parts, _ = ForObjectDetectionLoss(
        outputs.logits, renamed, torch.device("cpu"), outputs.boxes, config, *stacked
    )
    ours = detection_loss(outputs, targets)
    for one, other in zip(
        ours, (total, parts["loss_ce"], parts["loss_bbox"], parts["loss_giou"]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    leaves = [x for block in (*outputs.auxiliary, outputs) for x in block[:2]]
    for one, other in zip(
        torch.autograd.grad(ours.total, leaves), torch.autograd.grad(total, leaves), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.vision
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_boxes_in_pixels_are_transformers(threshold):
    pytest.importorskip("transformers")
    from transformers.models.detr.image_processing_detr import DetrImageProcessor
    from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

    outputs, _ = outputs_and_targets()
    sizes = [(480, 640), (33, 71), (800, 1333)]
    theirs = DetrImageProcessor().post_process_object_detection(
        DetrObjectDetectionOutput(logits=outputs.logits, pred_boxes=outputs.boxes), threshold, sizes
    )
    ours = postprocess(outputs, sizes, threshold)
    assert 0 < sum(len(one["labels"]) for one in ours) <= 21
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)


def test_boxes_in_pixels():
    logits = torch.tensor([[[0.0, 9, 0], [0, 0, 9]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 1], [0.5, 0.5, 0.1, 0.1]]])
    for sizes in ([(10, 40)], torch.tensor([[10, 40]])):
        (found,) = postprocess(Detections(logits, boxes), sizes)
        assert found["labels"].tolist() == [1] and found["boxes"].tolist() == [[10, 0, 30, 10]]
        assert found["scores"].item() == pytest.approx(0.99975, abs=1e-4)


def test_it_learns_a_handful_of_images():
    model = small().train()
    images, targets = rectangles()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    totals = []
    for _ in range(45):
        loss = detection_loss(model(images), targets).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        totals.append(loss.item())
    assert totals[-1] < 0.2 * totals[0]
    # The norms of the backbone keep their statistics, those of the head do not.
    moved = {key for key, b in model.named_buffers() if key.endswith("running_mean") and b.abs().max() > 0}
    assert moved and not any(key.startswith("backbone") for key in moved)


ABLATIONS = {
    "whole": {},
    "spatial": dict(spatial=False),
    "positions": dict(adapt_position=False),
    "one scale": dict(blocks=(2,)),
    "no attention in Mobile": dict(mobile_attention=False),
    "Former first": dict(mobile_first=False),
}


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablations_train(ablation):
    """Every parameter gets a gradient; where the Former comes first, not those that make the last map."""
    model = small(**ABLATIONS[ablation]).train()
    images, targets = rectangles()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    totals = []
    for _ in range(16):
        loss = detection_loss(model(images), targets).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert totals[-1] < 0.6 * totals[0]
    unread = {key for key, p in model.named_parameters() if p.grad is None}
    if ablation == "Former first":
        last_map = ("adapt_position", "conv1", "conv2", "hyper", "global_local")
        assert unread == {
            key
            for key, _ in model.named_parameters()
            if key.startswith(tuple(f"scales.1.0.{part}." for part in last_map))
        }
    else:
        assert not unread


def mask_of(batch, height, width, inside=True):
    return torch.zeros(batch, height, width) > (0 if inside else -1)


@pytest.mark.parametrize(
    ("images", "mask", "error", "message"),
    [
        ((1, 4, 32, 32), None, ValueError, "x must have 3 channels, got shape .1, 4, 32, 32."),
        ((3, 32, 32), None, ValueError, "images must have 4 dimensions"),
        ((1, 3, 0, 32), None, ValueError, "images must have a pixel at least"),
        ((2, 3, 32, 32), mask_of(2, 16, 32), ValueError, "shape .* = .2, 32, 32., got .2, 16, 32."),
        ((1, 3, 32, 32), mask_of(2, 32, 32), ValueError, "mask must have shape"),
        ((1, 3, 32, 32), mask_of(1, 32, 32)[0], ValueError, "mask must have shape .B, H, W., got .32, 32."),
        ((1, 3, 32, 32), mask_of(1, 32, 32).float(), TypeError, "must be a bool tensor, got torch.float32"),
        ((1, 3, 32, 32), mask_of(1, 32, 32, False), ValueError, "mask must be True at the bottom"),
        ((1, 3, 32, 32), mask_of(1, 32, 32).index_fill(1, torch.tensor(3), True), ValueError, "the bottom"),
    ],
)  # fmt: skip
def test_bad_images(images, mask, error, message):
    with pytest.raises(error, match=message):
        small()(torch.randn(images), mask)


def test_images_of_one_pixel_and_no_images():
    model = small().eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 1, 1)).boxes.isfinite().all()
        assert model(torch.randn(0, 3, 32, 32)).logits.shape == (0, 5, 3)


@pytest.mark.parametrize(
    ("labels", "boxes", "error", "message"),
    [
        ([5], [[0.5, 0.5, 0.1, 0.1]], ValueError, "targets.0..'labels'. must be from 0 to 4, got .5."),
        ([-1], [[0.5, 0.5, 0.1, 0.1]], ValueError, "must be from 0 to 4"),
        ([0.0], [[0.5, 0.5, 0.1, 0.1]], TypeError, "must be an int64 tensor"),
        ([0, 1], [[0.5, 0.5, 0.1, 0.1]], ValueError, "must have shape .n, 4. = .2, 4., got .1, 4."),
        ([0], [[0.5, 0.5, 0.1]], ValueError, "must have shape .n, 4."),
        ([0], [[0.9, 0.5, 0.4, 0.1]], ValueError, "must lie in the image"),
        ([0], [[0.5, 0.5, 0.1, 0.0]], ValueError, "must lie in the image"),
        ([0], [[0.5, 0.5, 0.1, float("nan")]], ValueError, "must lie in the image"),
        ([0], [[50, 50, 10, 10]], TypeError, "must have a floating-point dtype"),
    ],
)
def test_bad_targets(labels, boxes, error, message):
    outputs, targets = outputs_and_targets(1)
    targets[0] = dict(labels=torch.tensor(labels), boxes=torch.tensor(boxes))
    with pytest.raises(error, match=message):
        detection_loss(outputs, targets)


def test_other_bad_arguments():
    outputs, targets = outputs_and_targets(1)
    with pytest.raises(ValueError, match="targets must be one for each of 3 images, got 2"):
        detection_loss(outputs, targets[:2])
    with pytest.raises(TypeError, match="must be a dictionary with 'labels' and 'boxes'"):
        detection_loss(outputs, [dict(boxes=torch.zeros(0, 4))] * 3)
    with pytest.raises(ValueError, match="outputs must be finite"):
        detection_loss(outputs._replace(logits=outputs.logits * torch.nan), targets)
    with pytest.raises(ValueError, match="sizes must be a positive height and width for each of 3 images"):
        postprocess(outputs, [(32, 32)])
    name = "e2e_mobile_former_151m"
    for options, message in (
        (dict(scales=3), "scales of e2e_mobile_former_151m must be from 1 to 2, got 3"),
        (dict(num_classes=0), "num_classes must be a positive integer, got 0"),
        (dict(queries=2.5), "queries must be a positive integer, got 2.5"),
        (dict(features_only=True), "features_only is of networks for classification"),
        (dict(token_id=200), "token_id must be from 0 to 99, got 200"),
        (dict(num_heads=3), "num_heads must be positive and divide dim, got 3 for 256 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            create_model(name, **options)
    with pytest.raises(ValueError, match="did you mean e2e_mobile_former_508m"):
        create_model("e2e_mobile_former_500m")
    backbone = create_model("iformer_t", features_only=True)
    with pytest.raises(TypeError, match="backbone must be a FeaturePyramid of a MobileFormer"):
        EndToEndMobileFormer(backbone, (1,))


def test_detect_writes_boxes(tmp_path, capsys, monkeypatch):
    pillow = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    from mfkernels import detect

    monkeypatch.setattr(detect, "SHORT", 64)
    photo = tmp_path / "000042.png"
    pillow.new("RGB", (90, 60), "blue").save(photo)
    arguments = ["detect", str(photo), "--model", "e2e_mobile_former_151m", "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, "--threshold", "0"]) == 0
    assert "100 objects" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "detect.json").read_text())
    assert len(results) == 100
    for result in results:
        assert result["image_id"] == 42 and result["category_id"] in range(91) and 0 < result["score"] < 1
        assert len(result["bbox"]) == 4 and min(result["bbox"][2:]) > 0
    drawn = pillow.open(tmp_path / "out" / "detect.png")
    assert drawn.size == (90, 60) and (255, 0, 0) in {color for _, color in drawn.getcolors(1 << 16)}
    model = create_model("e2e_mobile_former_151m", num_classes=3, queries=7)
    torch.save({"model": model.state_dict()}, tmp_path / "own.pt")
    assert cli.main([*arguments, "--threshold", "0", "--checkpoint", str(tmp_path / "own.pt")]) == 0
    results = json.loads((tmp_path / "out" / "detect.json").read_text())
    assert len(results) == 7 and {result["category_id"] for result in results} <= {0, 1, 2}
    for wrong, message in ((["--threshold", "2"], "threshold"), (["--checkpoint", "none.pth"], "none.pth")):
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments, *wrong])
        assert stop.value.code != 0 and message in capsys.readouterr().err.splitlines()[-1]
