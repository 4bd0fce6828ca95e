"""The library that casts for PyTorch 1.x: the real one where it is at hand, and a stand-in."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn


def rounded(x):
    """`x` as the library hands it to a function; on a CPU half precision has no functions."""
    return x.half().float() if torch.is_tensor(x) and x.is_floating_point() else x


class Handle:
    """Whether functions cast, and the copies of weights."""

    def __init__(self):
        self.active, self.cache = True, {}

    def is_active(self):
        return self.active

    def casting(self, function):
        """`function` on rounded operands; weights are rounded once, until the cache is emptied."""
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            if not self.active:
                return function(*args, **kwargs)
            return function(*[self.cached(x) for x in args], **kwargs)
        return wrapper

    def cached(self, x):
        if not isinstance(x, nn.Parameter):
            return rounded(x)
        found = self.cache.get(x)
        if found is None or torch.is_grad_enabled() and found.requires_grad != x.requires_grad:
            found = self.cache[x] = rounded(x)
        return found


class StandIn:
    """What is used of apex.amp, with those of its ways that have to be lived with.

    Functions that are patched stay so, twice if asked twice. `disable_casts` ends with casts on,
    whatever they were. At O2 all parameters are rounded.
    """

    casts = True

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch
        self._amp_state = types.SimpleNamespace()
        self.calls = []

    def initialize(self, models, opt_level="O1", loss_scale=None, verbosity=1):
        self.calls.append(("initialize", opt_level, loss_scale))
        assert all(p.dtype == torch.float32 for p in models.parameters())
        if opt_level == "O1":
            self._amp_state.handle = Handle()
            for name in ("linear", "conv2d"):
                function = self._amp_state.handle.casting(getattr(F, name))
                self._monkeypatch.setattr(F, name, function)
        else:
            for module in models.modules():
                if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                    for parameter in module.parameters(recurse=False):
                        parameter.data = parameter.data.half()

    @contextlib.contextmanager
    def disable_casts(self):
        self._amp_state.handle.active = False
        yield
        self._amp_state.handle.active = True

    @contextlib.contextmanager
    def scale_loss(self, loss, optimizers):
        assert optimizers == []
        yield loss
        self.calls.append("drop copies")
        self._amp_state.handle.cache.clear()

    def undo(self):
        pass  # monkeypatch does


class Real:
    """The module apex.amp, with a note of each call; `undo` takes its patches off PyTorch."""

    def __init__(self, amp, device):
        self._amp, self.casts = amp, device.type != "cpu"
        self.calls, self._handles = [], []
        self._before = nn.Module.zero_grad, nn.modules.rnn._VF
        self._amp_state.allow_incoming_model_not_fp32 = not self.casts  # it wants its own device

    def __getattr__(self, name):
        return getattr(self._amp, name)

    def initialize(self, *models, **settings):
        self.calls.append(("initialize", settings["opt_level"], settings["loss_scale"]))
        found = self._amp.initialize(*models, **settings)
        if settings["opt_level"] == "O1":
            self._handles.append(self._amp_state.handle)
        return found

    @contextlib.contextmanager
    def scale_loss(self, *args):
        with self._amp.scale_loss(*args) as loss:
            yield loss
        self.calls.append("drop copies")

    def undo(self):
        for handle in reversed(self._handles):
            for holder, name, function in reversed(handle._all_wrappers):
                if isinstance(holder, dict):
                    holder[name] = function
                else:
                    setattr(holder, name, function)
        nn.Module.zero_grad, nn.modules.rnn._VF = self._before
        if self._handles:
            del self._amp_state.handle


def find_real(monkeypatch, device):
    """The real library, installed or in the folder that APEX_SOURCE names; skips without."""
    source = os.environ.get("APEX_SOURCE")
    if source:
        monkeypatch.syspath_prepend(source)
        paths = [source, os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    try:
        amp = importlib.import_module("apex.amp")
        amp.initialize(nn.Linear(1, 1), opt_level="O0", enabled=False)
        importlib.import_module("apex.amp.scaler").LossScaler(1.0)
    except Exception as error:  # the package on PyPI, or one for a device that is not there
        pytest.skip(f"no apex.amp for {device} ({error or type(error).__name__}); APEX_SOURCE "
                    "names a folder that holds one")
    return Real(amp, device)


@pytest.fixture(params=["stand-in", "real"])
def library(request, monkeypatch, device):
    """The library that casts; PyTorch is as before when the test has ended."""
    if request.param == "real":
        found = find_real(monkeypatch, device)
    else:
        found = StandIn(monkeypatch)
        monkeypatch.setitem(sys.modules, "apex.amp", found)
    yield found
    found.undo()
