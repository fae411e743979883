"""What users of torch do around an optimizer: each test is a situation, lived through with ours and with torch's.

Those that act on what is inside of ours (states, strides, copies, processes) are in test_torch_optim.py.
"""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: fastopt.torch is for it (CI installs it)")

from test_torch_optim import assert_same, batch, loss_of, network, train  # noqa: E402

import fastopt.torch as ft  # noqa: E402


def with_both(run: Callable[[ModuleType], Any]) -> None:
    """Live through a situation with our optimizers and with torch's: the models that it returns must be the same."""
    assert_same(*[run(kind) for kind in (ft, torch.optim)])


# --- where gradients come from ----------------------------------------------------------------------------------------


def test_gradients_of_torch_autograd_grad_that_are_assigned():
    def run(kind: ModuleType) -> Any:
        model = network()
        opt = kind.AdamW(model.parameters(), lr=0.01)
        for step in range(4):
            params = list(model.parameters())
            for p, g in zip(params, torch.autograd.grad(loss_of(model, step), params), strict=True):
                p.grad = g
            opt.step()
        return model

    with_both(run)


def test_gradients_of_torch_func_with_functional_call():
    def run(kind: ModuleType) -> Any:
        model = network()
        opt = kind.AdamW(model.parameters(), lr=0.01)

        def loss(params: Any, x: Any) -> Any:
            return torch.func.functional_call(model, params, (x,)).square().mean()

        for step in range(4):
            grads = torch.func.grad(loss)(dict(model.named_parameters()), batch(step))
            for name, p in model.named_parameters():
                p.grad = grads[name]
            opt.step()
        return model

    with_both(run)


def test_gradients_of_each_sample_that_are_clipped_and_averaged():
    def run(kind: ModuleType) -> Any:
        model = network()
        opt = kind.AdamW(model.parameters(), lr=0.01)

        def loss(params: Any, x: Any) -> Any:
            return torch.func.functional_call(model, params, (x[None],)).square().mean()

        for step in range(4):
            params = {name: p.detach() for name, p in model.named_parameters()}
            grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, batch(step))
            for name, p in model.named_parameters():
                p.grad = grads[name].clamp(-0.1, 0.1).mean(0)
            opt.step()
        return model

    with_both(run)


def test_an_ensemble_of_models_in_stacked_parameters():
    def run(kind: ModuleType) -> Any:
        params, buffers = torch.func.stack_module_state([network(), network()])
        template = copy.deepcopy(network()).to("meta")
        opt = kind.AdamW(params.values(), lr=0.01)
        for step in range(4):
            opt.zero_grad()
            y = torch.func.vmap(lambda p, b, x: torch.func.functional_call(template, (p, b), (x,)), (0, 0, None))(
                params, buffers, batch(step)
            )
            y.square().mean().backward()
            opt.step()
        return torch.nn.ParameterList([torch.nn.Parameter(p.detach()) for p in params.values()])

    with_both(run)


def test_a_gradient_penalty_whose_gradients_have_a_graph():
    def run(kind: ModuleType) -> Any:
        model = network()
        opt = kind.AdamW(model.parameters(), lr=0.01)
        for step in range(3):
            opt.zero_grad()
            x = batch(step).requires_grad_()
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            (slope.norm(dim=1) - 1).square().mean().backward(create_graph=True, inputs=list(model.parameters()))
            assert model[0].weight.grad.requires_grad
            opt.step()
        return model

    with pytest.warns(UserWarning, match="create_graph=True"):
        with_both(run)


def test_one_gradient_tensor_for_two_parameters():
    def run(kind: ModuleType) -> Any:
        model = network()
        opt = kind.AdamW([model[0].bias, model[2].bias], lr=0.01)
        for step in range(3):
            model[0].bias.grad = model[2].bias.grad = torch.arange(8.0) - step
            opt.step()
        return model

    with_both(run)


def test_gradients_that_are_clipped_by_value_and_changed_in_place():
    def run(kind: ModuleType) -> Any:
        model = network()
        opt = kind.AdamW(model.parameters(), lr=0.01)
        for step in range(4):
            opt.zero_grad()
            loss_of(model, step).backward()
            torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
            model[0].weight.grad.add_(0.001)
            opt.step()
        return model

    with_both(run)


def test_anomaly_detection_and_deterministic_algorithms():
    def run(kind: ModuleType) -> Any:
        model = network()
        torch.use_deterministic_algorithms(True)
        try:
            with torch.autograd.detect_anomaly():
                return train(model, kind.AdamW(model.parameters(), lr=0.01), 3)
        finally:
            torch.use_deterministic_algorithms(False)

    with pytest.warns(UserWarning, match="Anomaly Detection"):
        with_both(run)


# --- where parameters come from ---------------------------------------------------------------------------------------


def test_a_model_that_was_made_on_the_meta_device():
    def run(kind: ModuleType) -> Any:
        with torch.device("meta"):
            model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        model.to_empty(device="cpu")
        torch.manual_seed(0)
        for p in model.parameters():
            torch.nn.init.normal_(p)
        return train(model, kind.AdamW(model.parameters(), lr=0.01), 3)

    with_both(run)


def test_a_default_device_and_parameters_of_a_subclass():
    class Own(torch.nn.Parameter):
        pass

    def run(kind: ModuleType) -> Any:
        torch.set_default_device("cpu")
        try:
            model = network()
            model[0].weight = Own(model[0].weight.detach())
            return train(model, kind.AdamW(model.parameters(), lr=0.01), 3)
        finally:
            torch.set_default_device(None)

    with_both(run)


def test_parameters_over_the_memory_of_numpy(tmp_path):
    def run(kind: ModuleType) -> Any:
        model = network()
        on_disk = np.memmap(tmp_path / kind.__name__, np.float32, "w+", shape=(8, 6))
        on_disk[:] = model[0].weight.detach()
        model[0].weight = torch.nn.Parameter(torch.from_numpy(on_disk))
        train(model, kind.AdamW(model.parameters(), lr=0.01), 3)
        assert np.array_equal(on_disk, model[0].weight.detach().numpy())
        return model

    with_both(run)


def test_a_vector_of_parameters_that_is_put_back_into_the_model():
    """The parameters are then views of one tensor, and of the vector."""

    def run(kind: ModuleType) -> Any:
        model = network()
        opt = kind.AdamW(model.parameters(), lr=0.01)
        train(model, opt, 2)
        vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach() * 0.5
        torch.nn.utils.vector_to_parameters(vector, model.parameters())
        train(model, opt, 2, first=2)
        assert torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()), vector)
        return model

    with_both(run)


@pytest.mark.parametrize("how", ["data", "overwrite", "swap"])
def test_a_conversion_of_the_model_after_steps(how):
    """torch sets `data`, or makes new parameters, or swaps the tensors under the old ones."""

    def run(kind: ModuleType) -> Any:
        model = network()
        opt = kind.AdamW(model.parameters(), lr=0.01)
        train(model, opt, 2)
        setting = {
            "overwrite": torch.__future__.set_overwrite_module_params_on_conversion,
            "swap": torch.__future__.set_swap_module_params_on_conversion,
        }.get(how, lambda on: None)
        opt.zero_grad()
        setting(True)
        try:
            model.double()
        finally:
            setting(False)
        if kind is torch.optim:  # whose states would stay float32
            opt.load_state_dict(opt.state_dict())
        return train(model, opt, 2, first=2)

    with_both(run)


def test_tensors_that_are_swapped():
    def run(kind: ModuleType) -> Any:
        model = network()
        opt = kind.AdamW(model.parameters(), lr=0.01)
        train(model, opt, 2)
        opt.zero_grad()
        torch.utils.swap_tensors(model[2].weight, torch.nn.Parameter(model[2].weight.detach() * 0.5))
        return train(model, opt, 2, first=2)

    with_both(run)


@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_of_the_model_that_is_loaded_between_steps(assign):
    """With assign=True the model has parameters that the optimizer has not, as in torch."""

    def run(kind: ModuleType) -> Any:
        model = network()
        opt = kind.AdamW(model.parameters(), lr=0.01)
        train(model, opt, 2)
        held = opt.param_groups[0]["params"]
        model.load_state_dict({name: 0.9 * p for name, p in network().state_dict().items()}, assign=assign)
        train(model, opt, 2, first=2)
        assert (held[0] is model[0].weight) != assign
        return torch.nn.ParameterList([*held, *model.parameters()])

    with_both(run)


@pytest.mark.filterwarnings(r"ignore:.torch\.jit:DeprecationWarning")
def test_a_scripted_and_a_traced_model():
    def run(kind: ModuleType) -> Any:
        model = network()
        for made in (torch.jit.script(model), torch.jit.trace(model, batch(0))):
            train(made, kind.AdamW(made.parameters(), lr=0.01), 3)
        return model

    with_both(run)


def test_fake_quantisation_in_training():
    class Quantised(torch.nn.Linear):
        def forward(self, x: Any) -> Any:
            weight = torch.fake_quantize_per_tensor_affine(self.weight, 0.05, 0, -128, 127)
            return torch.nn.functional.linear(x, weight, self.bias)

    def run(kind: ModuleType) -> Any:
        model = network()
        model[2].__class__ = Quantised
        return train(model, kind.AdamW(model.parameters(), lr=0.01), 4)

    with_both(run)


def test_layers_that_are_unfrozen_one_after_the_other():
    def run(kind: ModuleType) -> Any:
        model = network().requires_grad_(False)
        model[4].requires_grad_(True)
        opt = kind.AdamW(model[4].parameters(), lr=0.01)
        train(model, opt, 2)
        for k, layer in enumerate((model[2], model[0])):
            layer.requires_grad_(True)
            opt.add_param_group({"params": layer.parameters(), "lr": 0.005, "name": f"layer {k}"})
            train(model, opt, 2, first=2 + 2 * k)
        assert [group.get("name") for group in opt.param_groups] == [None, "layer 0", "layer 1"]
        return model

    with_both(run)


# --- what writes parameters between steps -----------------------------------------------------------------------------


def test_weights_that_are_clamped_and_a_target_network_that_follows():
    def run(kind: ModuleType) -> Any:
        model, target = network(), network().requires_grad_(False)
        opt = kind.AdamW(model.parameters(), lr=0.05)

        def each(step: int) -> None:
            with torch.no_grad():
                for p, q in zip(model.parameters(), target.parameters(), strict=True):
                    p.data.clamp_(-0.2, 0.2)
                    q.lerp_(p, 0.1)

        train(model, opt, 4, each=each)
        return torch.nn.ModuleList([model, target])

    with_both(run)


def test_stochastic_weight_averaging_with_a_batchnorm():
    def run(kind: ModuleType) -> Any:
        model = torch.nn.Sequential(network(), torch.nn.BatchNorm1d(3))
        if kind is ft:
            ft.convert_batchnorm(model)
        averaged = torch.optim.swa_utils.AveragedModel(model)
        opt = kind.SGD(model.parameters(), lr=0.05)
        scheduler = torch.optim.swa_utils.SWALR(opt, swa_lr=0.01, anneal_epochs=2)
        for step in range(6):
            opt.zero_grad()
            (model(batch(step)) - batch(step)[:, :3]).square().mean().backward()
            opt.step()
            averaged.update_parameters(model)
            scheduler.step()
        torch.optim.swa_utils.update_bn([batch(step) for step in range(4)], averaged)
        averaged.eval()
        assert opt.param_groups[0]["lr"] == pytest.approx(0.01)
        found = averaged(batch(9)).detach()
        return torch.nn.ParameterList([*averaged.parameters(), *model.parameters(), torch.nn.Parameter(found)])

    with_both(run)


def test_two_networks_against_each_other():
    def run(kind: ModuleType) -> Any:
        torch.manual_seed(0)
        generator, critic = network(), torch.nn.Linear(3, 1)
        of_generator = kind.Adam(generator.parameters(), lr=0.01, betas=(0.5, 0.9))
        of_critic = kind.Adam(critic.parameters(), lr=0.01, betas=(0.5, 0.9))
        for step in range(4):
            fake = generator(batch(step))
            of_critic.zero_grad()
            (critic(fake.detach()).mean() - critic(batch(step)[:, 3:]).mean()).backward()
            of_critic.step()
            of_generator.zero_grad()
            (-critic(fake).mean()).backward()
            of_generator.step()
        return torch.nn.ModuleList([generator, critic])

    with_both(run)


def test_lbfgs_goes_on_where_ours_stopped():
    def run(kind: ModuleType) -> Any:
        model = network()
        opt = kind.Adam(model.parameters(), lr=0.01)
        second = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

        def closure() -> Any:
            model.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            return loss

        for _ in range(2):
            opt.step(closure)
            second.step(closure)
        return model

    with_both(run)


# --- optimizers around optimizers -------------------------------------------------------------------------------------


def test_a_sharpness_aware_optimizer_that_has_ours_inside():
    class SAM(torch.optim.Optimizer):
        def __init__(self, params: Any, base: Any, rho: float = 0.05, **options: Any):
            super().__init__(params, {"rho": rho, **options})
            self.base = base(self.param_groups, **options)
            self.param_groups = self.base.param_groups
            self.defaults.update(self.base.defaults)

        @torch.no_grad()
        def step(self, closure: Any) -> None:
            with torch.enable_grad():
                closure()
            params = [p for group in self.param_groups for p in group["params"]]
            norm = torch.stack([p.grad.norm() for p in params]).norm()
            for p in params:
                self.state[p]["before"] = p.clone()
                p.add_(p.grad * self.param_groups[0]["rho"] / norm)
            with torch.enable_grad():
                closure()
            for p in params:
                p.copy_(self.state[p]["before"])
            self.base.step()

    def run(kind: ModuleType) -> Any:
        model = network()
        opt = SAM(model.parameters(), kind.AdamW, lr=0.01)
        for step in range(4):

            def closure(step: int = step) -> None:
                opt.zero_grad()
                loss_of(model, step).backward()

            opt.step(closure)
        return model

    with_both(run)


def test_a_look_ahead_that_reads_groups_and_keeps_its_own_in_the_state():
    def run(kind: ModuleType) -> Any:
        model = network()
        opt = kind.AdamW(model.parameters(), lr=0.02)
        slow = {p: p.detach().clone() for p in model.parameters()}

        def each(step: int) -> None:
            for group in opt.param_groups:
                for p in group["params"]:
                    opt.state[p]["slow"] = slow[p]
                    if step % 2:
                        slow[p].lerp_(p.detach(), 0.5)
                        p.data.copy_(slow[p])

        train(model, opt, 6, each=each)
        assert opt.state_dict()["state"][0]["slow"].shape == (8, 6)
        return model

    with_both(run)


def test_numbers_of_numpy_and_keys_of_ones_own_in_param_groups():
    def run(kind: ModuleType) -> Any:
        model = network()
        groups = [{"params": [p], "name": name, "lr": np.float64(0.01)} for name, p in model.named_parameters()]
        opt = kind.AdamW(groups, weight_decay=np.float64(0.1))

        def each(step: int) -> None:
            for group in opt.param_groups:
                group["lr"] = np.float64(0.01 * 0.5 ** (step + 1))

        train(model, opt, 4, each=each)
        assert opt.param_groups[0]["name"] == "0.weight"
        return model

    with_both(run)


def test_a_search_for_the_learning_rate_that_is_undone():
    def run(kind: ModuleType) -> Any:
        model = network()
        opt = kind.AdamW(model.parameters(), lr=0.01)
        train(model, opt, 2)
        before = copy.deepcopy((model.state_dict(), opt.state_dict()))
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1e-3 * 10**step)
        train(model, opt, 5, each=lambda step: scheduler.step())
        model.load_state_dict(before[0])
        opt.load_state_dict(before[1])
        train(model, opt, 2, first=2)
        assert opt.param_groups[0]["lr"] == 0.01
        return model

    with_both(run)


def test_a_checkpoint_of_model_optimizer_scheduler_and_scaler():
    def made(kind: ModuleType) -> Any:
        model = network()
        opt = kind.AdamW(model.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 0.05, total_steps=12)
        return model, opt, scheduler, torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)

    def go_on(run: Any, first: int) -> Any:
        model, opt, scheduler, scaler = run
        for step in range(first, first + 5):
            opt.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(opt)
            scaler.update()
            scheduler.step()
        return run

    def run(kind: ModuleType) -> Any:
        begun = go_on(made(kind), 0)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in begun], file)
        file.seek(0)
        resumed = made(kind)
        for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        for one in (begun, resumed):
            go_on(one, 5)
        assert_same(resumed[0], begun[0], rtol=0, atol=0)
        return resumed[0]

    with_both(run)


@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch's optimizers take named parameters from 2.6 on")
def test_named_parameters_that_are_loaded_in_another_order():
    """The recipe of torch's documentation: a hook puts the states in the order of the names."""

    def by_name(opt: Any, state_dict: Any) -> Any:
        found = copy.deepcopy(opt.state_dict())
        old = {
            name: state_dict["state"][k]
            for group in state_dict["param_groups"]
            for name, k in zip(group["param_names"], group["params"], strict=True)
        }
        for group in found["param_groups"]:
            for name, k in zip(group["param_names"], group["params"], strict=True):
                found["state"][k] = old[name]
        return found

    def run(kind: ModuleType) -> Any:
        model = network()
        opt = kind.AdamW(model.named_parameters(), lr=0.01)
        train(model, opt, 2)
        other = kind.AdamW(list(model.named_parameters())[::-1], lr=0.01)
        other.register_load_state_dict_pre_hook(by_name)
        other.load_state_dict(opt.state_dict())
        return train(model, other, 2, first=2)

    with_both(run)


# --- modes, threads and processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "enable_grad"])
def test_all_steps_inside_a_mode_of_autograd(mode):
    model, expected = network(), network()
    opt, other = ft.AdamW(model.parameters(), lr=0.01), torch.optim.AdamW(expected.parameters(), lr=0.01)
    for step in range(4):
        for m, o in ((model, opt), (expected, other)):
            o.zero_grad()
            loss_of(m, step).backward()
            with getattr(torch, mode)() if o is opt or mode != "inference_mode" else torch.no_grad():
                o.step()
    assert_same(model, expected)
    train(model, opt, 2), train(expected, other, 2)
    assert_same(model, expected)
    assert not any(state.is_inference() for entry in opt.state.values() for state in entry.values())


def test_threads_that_train_models_of_their_own():
    def run(kind: ModuleType) -> Any:
        models = torch.nn.ModuleList([network() for _ in range(4)])
        opts = [kind.AdamW(model.parameters(), lr=0.01 * (k + 1)) for k, model in enumerate(models)]
        pairs = zip(models, opts, strict=True)
        threads = [threading.Thread(target=train, args=pair, kwargs={"steps": 10}) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return models

    with_both(run)


def test_data_parallel_on_a_cpu():
    def run(kind: ModuleType) -> Any:
        model = torch.nn.DataParallel(network())
        train(model, kind.AdamW(model.parameters(), lr=0.01), 3)
        return model.module

    with_both(run)


def test_a_compiled_step():
    def run(kind: ModuleType) -> Any:
        model = network()
        opt = kind.AdamW(model.parameters(), lr=0.01)
        compiled = torch.compile(opt.step, backend="eager") if kind is ft else opt.step
        for step in range(3):
            opt.zero_grad()
            loss_of(model, step).backward()
            compiled()
        return model

    with_both(run)


RANK = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, fastopt.torch as ft
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard, distribute_tensor
from test_torch_optim import assert_same, loss_of, network, train

def work(rank, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
    found = []
    for kind in (ft.AdamW, torch.optim.AdamW):
        model = torch.nn.parallel.DistributedDataParallel(network(), gradient_as_bucket_view=True)
        opt = kind(model.parameters(), lr=0.01)
        for step in range(6):
            if step % 2:
                loss_of(model, 2 * step + rank).backward()
                opt.step()
                opt.zero_grad(set_to_none=step == 3)
            else:
                with model.no_sync():
                    loss_of(model, 2 * step + rank).backward()
        sharded = torch.nn.parallel.DistributedDataParallel(network())
        zero = ZeroRedundancyOptimizer(sharded.parameters(), optimizer_class=kind, lr=0.01)
        for step in range(4):
            zero.zero_grad()
            loss_of(sharded, 2 * step + rank).backward()
            zero.step()
        zero.consolidate_state_dict(0)
        assert rank or len(zero.state_dict()["state"]) == 6
        local = network()
        averaging = PostLocalSGDOptimizer(kind(local.parameters(), lr=0.01), PeriodicModelAverager(2, 0))
        for step in range(4):
            averaging.zero_grad()
            loss_of(local, 2 * step + rank).backward()
            averaging.step()
        found.append((model.module, sharded.module, local))
    for mine, theirs in zip(*found):
        assert_same(mine, theirs)
    sharded = distribute_tensor(torch.ones(4), dist.device_mesh.init_device_mesh("cpu", (2,)), [Shard(0)])
    try:  # as fully_shard(model) makes of parameters
        ft.AdamW([torch.nn.Parameter(sharded)])
    except TypeError as error:
        print("refused:", error)
    dist.destroy_process_group()

other = mp.get_context("fork").Process(target=work, args=(1, sys.argv[1]))
other.start()
work(0, sys.argv[1])
other.join()
print("exit", other.exitcode)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_that_share_gradients_or_states_or_parameters(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(f"import sys\nsys.path[:0] = ['tests', '.']\n{RANK}")
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "group")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.stdout.count("must be a dense tensor, got DTensor") == 2, found.stderr
    assert found.stdout.strip().endswith("exit 0"), found.stderr
