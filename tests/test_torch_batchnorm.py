"""`fastopt.torch.BatchNorm1d`, `2d` and `3d` against torch's: passes, statistics, gradients, everything around them."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: fastopt.torch is for it (CI installs it)")

import fastopt.torch as ft  # noqa: E402

SHAPES = [(8, 5), (6, 5, 7), (4, 5, 3, 6), (3, 5, 2, 4, 3)]


def modules(shape: tuple[int, ...], **options: Any) -> tuple[Any, Any]:
    """Ours and torch's, with the same state, float64."""
    kind = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[len(shape)]
    relu = options.pop("relu", False)
    theirs = getattr(torch.nn, kind)(shape[1], dtype=torch.float64, **options)
    mine = getattr(ft, kind)(shape[1], dtype=torch.float64, relu=relu, **options)
    if theirs.affine:
        torch.manual_seed(1)
        torch.nn.init.normal_(theirs.weight, 1.0)
        torch.nn.init.normal_(theirs.bias)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def arranged(x: Any, layout: str) -> Any:
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-3}],
    ids=str,
)
def test_passes_statistics_and_gradients_are_torchs(shape, layout, relu, options):
    mine, theirs = modules(shape, relu=relu, **options)
    generator = torch.Generator().manual_seed(2)
    for step in range(4):
        training = step != 2
        mine.train(training)
        theirs.train(training)
        x = 3 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        dy = torch.randn(shape, generator=generator, dtype=torch.float64)
        found = []
        for module in (mine, theirs):
            leaf = arranged(x, layout).detach().requires_grad_()
            y = module(leaf)
            y = y.relu() if relu and module is theirs else y
            module.zero_grad()
            y.backward(arranged(dy, layout))
            assert y.shape == shape
            found.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()])
        for own, other in zip(*found, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_and_memory_formats_are_kept(dtype):
    mine, theirs = modules((4, 5, 3, 6))
    mine.to(dtype)
    theirs.to(dtype)
    x = torch.randn(4, 5, 3, 6, dtype=dtype).to(memory_format=torch.channels_last)
    y = mine(x)
    assert y.dtype is dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, theirs(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [False, True])
def test_gradients_by_differences(training, relu):
    mine, _ = modules((3, 2, 4), relu=relu)
    mine.train(training)
    mine.running_var.fill_(2.0)
    torch.manual_seed(5)
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)

    def normalised(x: Any, weight: Any, bias: Any) -> Any:
        mine.weight, mine.bias = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())
        del mine._parameters["weight"], mine._parameters["bias"]
        mine.weight, mine.bias = weight, bias
        return mine(x)

    weight, bias = (torch.rand(2, dtype=torch.float64).add(0.5).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(normalised, (x, weight, bias))
    assert torch.autograd.gradgradcheck(normalised, (x, weight, bias))


@pytest.mark.parametrize("training", [True, False])
def test_gradients_in_a_graph_of_their_own_are_the_same(training):
    mine, _ = modules((8, 5), relu=True)
    mine.train(training)
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, mine.weight, mine.bias]
    losses = [(mine(x) + 1.0).square().sum() for _ in range(2)]  # whose gradient is not 0 where the ReLU is
    mine.running_mean.add_(1.0)  # as a batch in between would do
    grads = [torch.autograd.grad(loss, inputs, create_graph=k == 1) for k, loss in enumerate(losses)]
    for own, in_graph in zip(*grads, strict=True):
        assert in_graph.requires_grad
        torch.testing.assert_close(own, in_graph.detach(), rtol=1e-9, atol=1e-11)


def test_a_graph_that_is_kept_can_be_used_again():
    mine, theirs = modules((8, 5), relu=True)
    x = torch.randn(8, 5, dtype=torch.float64)
    grads = []
    for module in (mine, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        loss = (y.relu() if module is theirs else y).square().sum()
        first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], first)
        grads.append(first)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


def test_autograd_sees_that_the_input_was_overwritten():
    mine, _ = modules((8, 5))
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    inside = x * 1.0
    y = mine(inside)
    inside.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_running_statistics_that_change_are_seen_by_autograd():
    mine, _ = modules((8, 5))
    version = mine.running_mean._version
    mine(torch.randn(8, 5, dtype=torch.float64))
    assert mine.running_mean._version == version + 1


def test_a_batch_with_a_nan_does_not_spoil_the_module():
    mine, _ = modules((8, 5), relu=True)
    x = torch.randn(8, 5, dtype=torch.float64)
    mine(x)
    before = copy.deepcopy(mine.state_dict())
    x[0, 0] = float("nan")
    y = mine(x)
    assert y[:, 0].isnan().all()
    assert not y[:, 1:].isnan().any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_the_output_is_freed_without_the_garbage_collector(training):
    mine, _ = modules((8, 5))
    mine.train(training)
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    gc.disable()
    try:
        y = mine(x)
        output = weakref.ref(y)
        y.sum().backward()
        del y
        assert output() is None
    finally:
        gc.enable()


def test_the_input_is_kept_by_autograd_alone():
    """So that what it packs elsewhere, or computes again, takes no memory here."""
    mine, theirs = modules((8, 5), relu=True)
    packed: list[Any] = []

    def pack(tensor: Any) -> Any:
        packed.append(tensor.shape)
        return tensor.clone().t().contiguous().t() if tensor.ndim == 2 else tensor.clone()

    grads = []
    for module in (mine, theirs):
        torch.manual_seed(3)
        leaf = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
        inside = leaf * 1.0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = module(inside)
            y = y.relu() if module is theirs else y
        input_of = weakref.ref(inside.untyped_storage())
        del inside
        if module is mine:
            assert input_of() is None
        y.square().sum().backward()
        grads.append(leaf.grad)
    assert (8, 5) in packed
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


def batched(module: Any, x: Any) -> Any:
    """The gradients of two losses at a time."""
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(module(leaf), leaf, torch.stack([x, x.square()]), is_grads_batched=True)[0]


def transformed(module: Any, x: Any) -> Any:
    def loss(params: Any, buffers: Any) -> Any:
        return torch.func.functional_call(module, (params, buffers), (x,)).pow(3).sum()

    params, buffers = dict(module.named_parameters()), {name: b.clone() for name, b in module.named_buffers()}
    grads = torch.func.grad(loss)(params, buffers)
    module.eval()  # torch refuses to count a batch there
    y = torch.func.functionalize(module)(x)  # of tensors whose memory is elsewhere
    return torch.cat([y.flatten(), *[g.flatten() for g in grads.values()]])


def forward_mode(module: Any, x: Any) -> Any:
    with torch.autograd.forward_ad.dual_level():
        y = module(torch.autograd.forward_ad.make_dual(x, x.square()))
        return torch.autograd.forward_ad.unpack_dual(y).tangent.clone()


def counted(module: Any, x: Any) -> Any:
    seen = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Counting():
        y = module(x)
    assert any("batch_norm" in name for name in seen)
    return y


def negative(module: Any, x: Any) -> Any:
    """A tensor may have a sign that is not in its memory."""
    leaf = x.clone().requires_grad_()
    y = module(torch._neg_view(leaf))
    y.backward(torch._neg_view(x.square()))
    return leaf.grad


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, of forward mode
@pytest.mark.parametrize("way", [batched, transformed, forward_mode, counted, negative])
@pytest.mark.parametrize("training", [True, False])
def test_what_torch_transforms_or_observes_is_right(way, training):
    mine, theirs = modules((8, 5))
    x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = [way(module.train(training), x) for module in (mine, theirs)]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_large_tensors_are_as_small_ones():
    mine, theirs = modules((2, 2, 257, 513))  # 4 MiB, from which on NumPy allocates
    x = torch.randn(2, 2, 257, 513, dtype=torch.float64)
    for layout in ("contiguous", "channels_last"):
        leaves = [arranged(x, layout).detach().requires_grad_() for _ in range(2)]
        for module, leaf in zip((mine, theirs), leaves, strict=True):
            module(leaf).pow(3).sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-7, atol=1e-9)


def test_what_our_kernels_cannot_take_goes_to_torchs():
    mine, theirs = ft.BatchNorm2d(3, relu=True), torch.nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mine(x.bfloat16()), theirs(x.bfloat16()).relu())
    for module in (mine, theirs):
        module.bfloat16()
    assert torch.equal(mine(x.bfloat16()), theirs(x.bfloat16()).relu())
    assert torch.equal(mine.running_mean, theirs.running_mean)


def test_a_compiled_model_is_right():
    mine = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), ft.BatchNorm2d(4, relu=True))
    theirs = torch.nn.Sequential(copy.deepcopy(mine[0]), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    compiled = torch.compile(mine, backend="eager", fullgraph=True)
    for _ in range(2):
        x = torch.randn(2, 3, 6, 6)
        y, expected = compiled(x), theirs(x)
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        expected.sum().backward()
    torch.testing.assert_close(mine[1].weight.grad, theirs[1].weight.grad)
    torch.testing.assert_close(mine[1].running_var, theirs[1].running_var)


@pytest.mark.parametrize(
    ("shape", "match"),
    [((1, 3), "more than 1 value|at least 2 values"), ((4, 2), "channels|3"), ((4, 3, 2, 2), "expected 2D or 3D")],
)
def test_bad_shapes_are_refused(shape, match):
    with pytest.raises((ValueError, RuntimeError), match=match):
        ft.BatchNorm1d(3)(torch.randn(shape))
    with pytest.raises(TypeError, match="relu: must be True or False"):
        ft.BatchNorm1d(3, relu=1)


# --- models -----------------------------------------------------------------------------------------------------------


def cnn() -> Any:
    torch.manual_seed(0)
    nn = torch.nn
    body = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1)
    return nn.Sequential(*body, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))


def test_a_model_is_converted_in_place_and_back_and_forth():
    model = cnn()
    parameters, buffers = list(model.parameters()), list(model.buffers())
    called: list[int] = []
    model[1].register_forward_hook(lambda *_: called.append(1))
    before = cnn()
    assert ft.convert_batchnorm(model) is model
    assert type(model[1]) is ft.BatchNorm2d
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert all(p is q for p, q in zip(model.buffers(), buffers, strict=True))
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(model(x), before(x))
    assert called
    assert list(model.state_dict()) == list(before.state_dict())
    before.load_state_dict(model.state_dict())
    model.eval(), before.eval()
    for twin in (model, copy.deepcopy(model), ft.convert_batchnorm(pickle.loads(pickle.dumps(before)))):
        torch.testing.assert_close(twin(x), before(x))
    assert type(pickle.loads(pickle.dumps(twin))[1]) is ft.BatchNorm2d
    assert "relu" not in repr(model[1])
    assert repr(ft.BatchNorm2d(2, relu=True)).endswith("relu=True)")
    assert type(torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)[1]) is torch.nn.SyncBatchNorm
    with pytest.raises(TypeError, match=r"model: must be a torch.nn.Module"):
        ft.convert_batchnorm([model])


def digits() -> tuple[Any, Any]:
    datasets = pytest.importorskip("sklearn.datasets", reason="the digits are scikit-learn's")
    found = datasets.load_digits()
    return torch.tensor(found.images[:512, None] / 16.0, dtype=torch.float32), torch.tensor(found.target[:512])


def mlp() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))


@pytest.mark.parametrize("network", [mlp, cnn])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_the_digits_are_learnt_along_the_same_loss_curve(network, name):
    """The example of the documentation: both optimizers, with torch's BatchNorm and with ours."""
    x, target = digits()
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {"lr": 0.01}
    curves = []
    for mine in (True, False):
        model = network()
        if mine:
            ft.convert_batchnorm(model)
        opt = getattr(ft if mine else torch.optim, name)(model.parameters(), **options)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 48)
        losses = []
        for step in range(48):
            batch = slice(64 * (step % 8), 64 * (step % 8) + 64)
            opt.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x[batch]), target[batch])
            loss.backward()
            opt.step()
            scheduler.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=0.02, abs=0.005)  # float32, 48 steps of a network that learns
    assert sum(curves[0][-8:]) < 0.5 * sum(curves[0][:8])
