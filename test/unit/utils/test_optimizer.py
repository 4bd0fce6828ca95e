"""Flat optimisers: equal to torch's, guarded on the device, resumable, few operators."""

from __future__ import annotations

import copy
import io
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

from data.config import get_config
from helpers.paths import ROOT
from helpers.recorder import SKIP_REASON, Recorder, available
from utils.errors import UserError
from utils.optimizer import (
    ALIGNMENT,
    FlatAdamW,
    FlatSGD,
    build_optimizer,
    has_fused_update,
    propagate_nonfinite,
)

NOT_FINITE = [float("nan"), float("inf"), float("-inf"), 1e30]


def _network(seed=0):
    torch.manual_seed(seed)
    # No bias before the batch norm: its gradient is rounding noise, which Adam would blow up.
    return nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(),
                         nn.Linear(5 * 6 * 6, 7), nn.Tanh(), nn.Linear(7, 1))


def _backward(network, seed, factor=1.0):
    generator = torch.Generator().manual_seed(seed)
    loss = (network(torch.randn(4, 3, 8, 8, generator=generator)) ** 2).sum() * factor
    loss.backward()


def _parts(network):
    return {"parameters": [p for p in network.parameters() if p.dim() > 1],
            "undecayed": [p for p in network.parameters() if p.dim() <= 1]}


def _decay_groups(network):
    parts = _parts(network)
    return [{"params": parts["parameters"], "weight_decay": 0.1},
            {"params": parts["undecayed"], "weight_decay": 0.0}]


PAIRS = {
    "sgd": (lambda n: FlatSGD(n.parameters(), momentum=0.9, weight_decay=0.01),
            lambda n: torch.optim.SGD(n.parameters(), 1, momentum=0.9, weight_decay=0.01)),
    "sgd plain": (lambda n: FlatSGD(n.parameters(), momentum=0.0),
                  lambda n: torch.optim.SGD(n.parameters(), 1)),
    "sgd clipped": (lambda n: FlatSGD(n.parameters(), momentum=0.9, clip_norm=0.5),
                    lambda n: torch.optim.SGD(n.parameters(), 1, momentum=0.9)),
    "adamw": (lambda n: FlatAdamW(n.parameters(), weight_decay=0.1),
              lambda n: torch.optim.AdamW(n.parameters(), 1, weight_decay=0.1)),
    "adamw groups": (lambda n: FlatAdamW(weight_decay=0.1, **_parts(n)),
                     lambda n: torch.optim.AdamW(_decay_groups(n), 1)),
    "adamw clipped": (lambda n: FlatAdamW(n.parameters(), weight_decay=0.1, clip_norm=0.5),
                      lambda n: torch.optim.AdamW(n.parameters(), 1, weight_decay=0.1)),
}
FLAT = {"sgd": PAIRS["sgd"][0], "adamw": PAIRS["adamw groups"][0]}
FUSED = {
    "sgd": (lambda n: FlatSGD(n.parameters(), momentum=0.9, weight_decay=0.01, fused=True),
            lambda n: torch.optim.SGD(n.parameters(), 1, momentum=0.9, weight_decay=0.01,
                                      fused=True)),
    "adamw": (lambda n: FlatAdamW(weight_decay=0.1, **_parts(n), fused=True),
              lambda n: torch.optim.AdamW(_decay_groups(n), 1, fused=True)),
}
fused = pytest.mark.skipif(not has_fused_update(), reason="PyTorch has no fused update for the CPU")
WAYS = {**{(name, False): make for name, make in FLAT.items()},
        **{(name, True): pair[0] for name, pair in FUSED.items()}}
EACH_WAY = [pytest.param(WAYS[key], id=key[0] + " fused" * key[1], marks=[fused] * key[1])
            for key in WAYS]


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_equals_torchs_optimizer(name):
    ours, theirs = _network(), _network()
    flat, plain = PAIRS[name][0](ours), PAIRS[name][1](theirs)
    for step in range(8):
        lr = 0.01 / (step + 1)
        for group in plain.param_groups:
            group["lr"] = lr
        flat.zero_grad()
        plain.zero_grad()
        _backward(ours, step)
        _backward(theirs, step)
        if "clipped" in name:
            norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        flat.step(lr)
        plain.step()
        if "clipped" in name:
            assert float(flat.grad_norm) == pytest.approx(float(norm), rel=1e-4)
            assert float(norm) > 0.5
    assert int(flat.steps) == 8
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert float((mine - other).detach().abs().max()) < 1e-6, key


@fused
@pytest.mark.parametrize("name", sorted(FUSED))
def test_equals_torchs_fused_optimizer_to_the_bit(name):
    ours, theirs = _network(), _network()
    flat, plain = FUSED[name][0](ours), FUSED[name][1](theirs)
    for step in range(5):
        for group in plain.param_groups:
            group["lr"] = 0.01 / (step + 1)
        flat.zero_grad()
        plain.zero_grad()
        _backward(ours, step)
        _backward(theirs, step)
        flat.step(0.01 / (step + 1))
        plain.step()
    _assert_same(list(ours.parameters()), list(theirs.parameters()))


@fused
@pytest.mark.parametrize("name", sorted(FUSED))
def test_both_ways_of_an_update_take_scale_overflow_and_norm_alike(name):
    """They differ in the last bit; the state of one goes on in the other."""
    networks = [_network(), _network()]
    flats = [WAYS[name, False](networks[0]), WAYS[name, True](networks[1])]
    for flat in flats:
        flat.clip_norm = 0.5
    for step in range(4):
        for network, flat in zip(networks, flats):
            flat.zero_grad()
            _backward(network, step, factor=64.0)
            flat.step(0.01, torch.tensor(64.0), torch.tensor(float(step == 1)))
        assert float(flats[0].grad_norm) == pytest.approx(float(flats[1].grad_norm), rel=1e-4)
        assert bool(flats[0].step_finite) == bool(flats[1].step_finite) == (step != 1)
        if step == 2:
            flats[1].load_state_dict(flats[0].state_dict())
    assert int(flats[0].steps) == int(flats[1].steps) == 3
    for one, other in zip(*(network.parameters() for network in networks)):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)


def test_parameters_keep_their_identity_and_live_in_one_aligned_buffer():
    network = _network()
    before = list(network.parameters())
    values = [p.detach().clone() for p in before]
    FlatSGD(network.parameters())
    after = list(network.parameters())
    assert all(a is b for a, b in zip(before, after))
    assert all(torch.equal(p, value) for p, value in zip(after, values))
    offsets = [p.data_ptr() - after[0].data_ptr() for p in after]
    assert all(offset % (ALIGNMENT * 4) == 0 for offset in offsets)
    assert offsets == sorted(offsets)
    assert offsets[-1] < 4 * sum(p.numel() + ALIGNMENT for p in after)


def test_weights_loaded_later_are_the_ones_that_are_trained():
    network, other = _network(0), _network(1)
    flat = FlatSGD(network.parameters())
    network.load_state_dict(other.state_dict())
    assert torch.equal(network[0].weight, other[0].weight)
    _backward(network, 0)
    flat.step(0.01)
    assert not torch.equal(network[0].weight, other[0].weight)
    assert float((network[0].weight - other[0].weight).detach().abs().max()) < 1


@pytest.mark.parametrize("make", EACH_WAY)
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing(make, value, first):
    network = _network()
    flat = make(network)
    if not first:
        _backward(network, 0)
        flat.step(0.01)
    before = _everything(network, flat)
    flat.zero_grad()
    _backward(network, 1)
    network[4].weight.grad[3, 2] = value
    flat.step(0.01)
    assert not bool(flat.step_finite)
    _assert_same(before, _everything(network, flat))

    control = copy.deepcopy(network)  # the next step goes on as if nothing had been
    control_flat = make(control)
    control_flat.load_state_dict(flat.state_dict())
    for one, optimizer in ((network, flat), (control, control_flat)):
        optimizer.zero_grad()
        _backward(one, 2)
        optimizer.step(0.01)
    assert bool(flat.step_finite)
    assert int(flat.steps) == (1 if first else 2)
    _assert_same(_everything(network, flat), _everything(control, control_flat))


def _everything(network, flat):
    state = flat.state_dict()
    tensors = [p.detach().clone() for p in network.parameters()]
    return tensors + [t for name in flat.buffer_names for t in state["buffers"][name]] + [
        torch.tensor(state["steps"])]


def _assert_same(before, after):
    assert all(torch.equal(a, b) for a, b in zip(before, after))


@pytest.mark.parametrize("value", NOT_FINITE[:3])
def test_poison_turns_a_loss_that_is_not_finite_into_nan_gradients(value):
    network = _network()
    output = network(torch.zeros(2, 3, 8, 8)).sum()
    propagate_nonfinite(output + value).backward()
    assert all(bool((p.grad != p.grad).any()) for p in network[6].parameters())


def test_poison_leaves_a_finite_loss_alone():
    x = torch.tensor(3.0, requires_grad=True)
    loss = propagate_nonfinite(x * x)
    loss.backward()
    assert loss.item() == 9 and x.grad.item() == 6


@pytest.mark.parametrize("make", EACH_WAY)
def test_missing_gradients_count_as_zeros(make):
    one, other = _network(), _network()
    flats = [make(n) for n in (one, other)]
    for network, flat in zip((one, other), flats):
        _backward(network, 0)
        network[0].weight.grad = None if network is one else torch.zeros_like(network[0].weight)
        flat.step(0.1)
    _assert_same(_everything(one, flats[0]), _everything(other, flats[1]))


@pytest.mark.parametrize("make", EACH_WAY)
def test_stopping_and_resuming_is_exact(make):
    straight = _network()
    flat = make(straight)
    for step in range(6):
        if step == 3:
            file = io.BytesIO()
            torch.save([straight.state_dict(), flat.state_dict()], file)
        flat.zero_grad()
        _backward(straight, step)
        flat.step(0.01)

    resumed = _network(5)
    flat2 = make(resumed)
    file.seek(0)
    options = {"weights_only": True} if int(torch.__version__.split(".")[0]) >= 2 else {}
    weights, state = torch.load(file, **options)
    resumed.load_state_dict(weights)
    flat2.load_state_dict(state)
    for step in range(3, 6):
        flat2.zero_grad()
        _backward(resumed, step)
        flat2.step(0.01)
    _assert_same(_everything(straight, flat), _everything(resumed, flat2))


def test_a_state_that_does_not_fit_is_refused():
    sgd = FlatSGD(_network().parameters())
    with pytest.raises(UserError, match="FlatAdamW, this run uses FlatSGD"):
        sgd.load_state_dict(FlatAdamW(_network().parameters()).state_dict())
    with pytest.raises(UserError, match="2 tensors of other shapes than the model's 7"):
        sgd.load_state_dict(FlatSGD(nn.Linear(2, 2).parameters()).state_dict())


def test_a_model_moved_later_is_named():
    network = _network()
    flat = FlatSGD(network.parameters())
    network[0].weight.data = network[0].weight.data.clone()
    with pytest.raises(RuntimeError, match="moved or converted"):
        flat.step(0.1)


def test_the_recipes_optimizer_leaves_frozen_parameters_alone():
    network = _network()
    for parameter in network[1].parameters():
        parameter.requires_grad = False
    before = [p.detach().clone() for p in network[1].parameters()]
    sgd = build_optimizer(get_config("yolact_base"), network)
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert sgd._fused == has_fused_update() == (version >= (2, 4))
    assert isinstance(sgd, FlatSGD) and len(sgd.parameters) == 5
    _backward(network, 0)
    sgd.step(0.1)
    _assert_same(before, list(network[1].parameters()))
    assert isinstance(build_optimizer(get_config("yolact_shapes"), _network()), FlatAdamW)


def test_adamw_decays_only_tensors_of_more_than_one_dimension():
    network = _network()
    flat = build_optimizer(get_config("yolact_shapes"), network)
    before = {key: p.detach().clone() for key, p in network.named_parameters()}
    flat.step(1.0)  # no gradients: only the decay acts
    for key, parameter in network.named_parameters():
        factor = 1 - 1e-4 if parameter.dim() > 1 else 1
        assert torch.allclose(parameter, before[key] * factor, rtol=1e-6, atol=0), key


@pytest.mark.skipif(not available(), reason=SKIP_REASON)
@pytest.mark.parametrize("name", sorted(FLAT))
def test_operators_do_not_grow_with_the_number_of_tensors(name):
    kernels = []
    for depth in (1, 12):
        network = nn.Sequential(*[nn.Linear(9, 9) for _ in range(depth)])
        flat = FLAT[name](network)
        network(torch.zeros(2, 9)).sum().backward()
        recorder = Recorder()
        with recorder.step() as step:
            flat.step(0.1)
        assert step.syncs == []
        kernels.append(step.kernels)
    assert kernels[0] == kernels[1] <= {"sgd": 14, "adamw": 28}[name]


WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from utils.optimizer import FlatSGD, propagate_nonfinite

rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:" + port, rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
flat = FlatSGD(model.parameters(), momentum=0.9, weight_decay=0.01)
network = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)

def everything():
    momentum = flat.state_dict()["buffers"]["momentum"]
    return torch.cat([t.detach().reshape(-1) for t in list(model.parameters()) + momentum])

applied = []
for step in range(4):
    torch.manual_seed(10 * step + rank)
    before = everything()
    loss = network(torch.randn(3, 4)).pow(2).mean()
    if step in (0, 2) and rank == 1:
        loss = loss + float("inf" if step else "nan")  # finite gradients but for the poison
    flat.zero_grad()
    propagate_nonfinite(loss).backward()
    flat.step(0.1)
    applied.append(bool(flat.step_finite))
    after = everything()
    assert torch.equal(before, after) == (step in (0, 2)), step
    others = [torch.zeros_like(after) for _ in range(2)]
    dist.all_gather(others, after)
    assert torch.equal(others[0], others[1]), step
assert applied == [False, True, False, True], applied
print("rank", rank, "agrees", flush=True)
dist.barrier()  # a process that leaves early takes the others' connections down
dist.destroy_process_group()
"""


@pytest.mark.launch
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_skip_a_step_together(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    workers = [subprocess.Popen([sys.executable, str(script), str(rank), str(port)],
                                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                universal_newlines=True) for rank in range(2)]
    try:
        for rank, worker in enumerate(workers):
            output = worker.communicate(timeout=90)[0]
            assert worker.returncode == 0 and f"rank {rank} agrees" in output, output
    finally:
        for worker in workers:
            worker.kill()
