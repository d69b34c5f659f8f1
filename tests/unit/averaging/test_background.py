"""Averages on the host are updated in the background: as if they had not been.

Here the "device" is the CPU, its copies plain ones, and the thread the real one, which is always late.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from dataclasses import dataclass

import pytest
import torch
from reference.in_background import background
from torch import nn

from polyak import EMA, SWA, After, Average, Averages, PowerEMA, Window
from polyak.errors import NonFiniteError, PolyakWarning, UsageError
from polyak.tensors import blend

PROFILES = {
    "swa": SWA(),
    "ema": EMA(decay=0.9),
    "in blocks": EMA(decay=0.9999),
    "initial": EMA(decay=0.8, keep_initial=True),
    "power": PowerEMA(gamma=3.0),
    "window": Window(3),
    "late": After(4, SWA()),
}


class Network(nn.Module):
    """Of every kind: large and small, transposed, with gaps, complex, narrow and wide, buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(17, 30), nn.BatchNorm1d(30), nn.Linear(30, 30))
        self.flipped = nn.Parameter(torch.randn(11, 23).t())
        self.gaps = nn.Parameter(torch.randn(40, 6)[:, ::2])
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.none = nn.Parameter(torch.empty(0))
        self.pairs = nn.Parameter(torch.randn(150, dtype=torch.complex64))
        self.conjugate = nn.Parameter(torch.randn(7, dtype=torch.complex64).conj())
        self.narrow = nn.Parameter(torch.randn(333, dtype=torch.bfloat16))
        self.wide = nn.Parameter(torch.randn(20, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(9), requires_grad=False)
        self.register_buffer("seen", torch.zeros(130))

    def forward(self, x):
        self.seen.mul_(0.5).add_(x.mean())  # without an optimizer, as buffers are
        return self.body(x)


class Training:
    """A run whose steps write to everything at once, as soon as they are let."""

    def __init__(self, model=None, device="cpu"):
        self.device = device
        self.model = (Network() if model is None else model).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.generator = torch.Generator().manual_seed(1)

    def steps(self, n):
        for _ in range(n):
            x = torch.randn(5, 17, generator=self.generator).to(self.device)
            self.model(x).sum().backward()
            for parameter in filter(lambda p: p.requires_grad, self.model.parameters()):
                noise = torch.randn(parameter.shape, generator=self.generator)
                parameter.grad = torch.empty_like(parameter).copy_(noise)
            self.optimizer.step()


def states(averages):
    """What it holds, as `pickle` would write it, but for the attachment."""
    buffer = io.BytesIO()
    torch.save(averages.state_dict(), buffer)
    return torch.load(io.BytesIO(buffer.getvalue()))


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_same(*pair)
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    else:
        assert a == b


def our_threads():
    """The threads of averages in the background; others, such as torch's, come and go as they like."""
    return [one for one in threading.enumerate() if one.name.startswith("polyak-average")]


def averages_of(model, **options):
    return Averages(model, PROFILES, unit="steps", device="cpu", **options)


def attached(model, optimizer, **options):
    averages = averages_of(model, **options)
    averages.attach(optimizer)
    return averages


def plain(training):
    averages = attached(training.model, training.optimizer)
    training.steps(9)
    return averages


def one_by_one(training):
    averages = averages_of(training.model)
    averages["ema"].attach(training.optimizer)
    averages["window"].attach(training.optimizer, every=3)
    averages.attach(training.optimizer, every=2)
    training.steps(9)
    return averages


def by_hand(training):
    averages = averages_of(training.model)
    for dt in (1, 2.5, 0.25, 1):
        training.steps(1)
        averages.update(dt)
        for parameter in training.model.parameters():
            parameter.data.add_(1)  # nobody can see this
    return averages


def late(training):
    averages = averages_of(training.model)
    averages.attach(training.optimizer, before_next_step=True)
    for _ in range(4):
        training.steps(1)
        for parameter in training.model.parameters():
            parameter.data.mul_(0.5)
        assert averages["swa"].time > 0  # takes what is due
        for parameter in training.model.parameters():
            parameter.data.mul_(0.5)
    return averages


def buffers(training):
    averages = averages_of(training.model, average_buffers=["seen"])
    averages.attach(training.optimizer, by_hand=True)
    for _ in range(4):
        training.steps(1)
        averages.update()
        training.model(torch.ones(2, 17, device=training.device))
        averages.update()
    return averages


def skipped(training):
    averages = averages_of(training.model)
    averages.attach(training.optimizer, by_hand=True)
    for real in (1.0, 0.0, 1.0, 0.0, 1.0):
        training.steps(1)
        averages.update(real=torch.tensor(real))
    return averages


def nonfinite(training):
    averages = averages_of(training.model, nonfinite="skip", dtype=torch.float64)
    averages.attach(training.optimizer, by_hand=True)
    for value in (1.0, torch.nan, 1.0, torch.inf, 1.0):
        training.steps(1)
        training.model.wide.data[3] = value
        averages.update()
    assert averages._tracker.skipped == 2
    return averages


def thawed(training):
    averages = attached(training.model, training.optimizer)
    training.steps(3)
    training.model.frozen.requires_grad_(True)
    training.steps(3)
    training.model.frozen.requires_grad_(False)
    training.model.scalar.requires_grad_(False)
    training.steps(3)
    return averages


def moved(training):
    averages = attached(training.model, training.optimizer)
    for _ in range(4):
        training.steps(1)
        weight = training.model.body[0].weight
        weight.data = weight.data.clone() + 1  # the update reads what was there
    return averages


def read_between(training):
    averages = attached(training.model, training.optimizer)
    for _ in range(4):
        training.steps(2)
        averages["ema"].metrics()
        averages["swa"].update_bn([torch.ones(4, 17, device=training.device)])
        with averages["swa"].applied():
            assert training.model.narrow.dtype is torch.bfloat16
        averages["window"].averaged_tensors()
    averages["late"].copy_to(Network())
    return averages


def followed(training):
    averages = attached(training.model, training.optimizer)
    teacher = Network().to(training.device)
    averages["ema"].follower(teacher, buffers=True)
    averages["power"].write_back(every=4)
    training.steps(9)
    expected = averages["ema"].averaged_tensors()
    torch.testing.assert_close(teacher.state_dict(), {n: expected[n] for n in teacher.state_dict()})
    return averages


RUNS = [
    plain,
    one_by_one,
    by_hand,
    late,
    buffers,
    skipped,
    nonfinite,
    thawed,
    moved,
    read_between,
    followed,
]


DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
        ],
    ),
]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("room", [{}, {"ring_bytes": 1 << 26, "group_values": 1 << 20}])
@pytest.mark.parametrize("device", DEVICES)
def test_it_is_what_it_would_have_been_without(run, room, device):
    with background(of=lambda live, device: False, **room):
        expected = states(run(Training(device=device)))
    with background(**room):
        averages = run(Training(device=device))
        assert averages._tracker._background is not None
        assert_same(states(averages), expected)


def test_without_a_device_nothing_is_in_the_background():
    training = Training()
    before = set(our_threads())
    averages = plain(training)
    assert averages._tracker._background is None
    assert set(our_threads()) <= before  # those of other tests may end in between


def test_our_threads_are_known_by_their_name():
    with background():
        averages = plain(Training())
        assert our_threads(), "the test above would not see the thread that it is about"
        averages.detach()


def test_a_resumed_run_is_the_same():
    def run(parts):
        training = Training()
        averages = attached(training.model, training.optimizer)
        for part in parts:
            training.steps(part)
            saved = states(averages)
            averages.detach()
            averages = averages_of(training.model)
            averages.load_state_dict(saved)
            averages.attach(training.optimizer)
        return states(averages)

    with background():
        resumed = run([1, 4, 3, 1])
    assert_same(resumed, run([9]))


@dataclass
class Gate:
    """Work that waits until it may go on."""

    def __post_init__(self):
        self.open = threading.Event()
        self.reached = threading.Event()

    def __call__(self, job=lambda: None):
        self.reached.set()
        assert self.open.wait(30)
        return job()


def running(call):
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_training_waits_only_for_what_it_would_overwrite():
    gate = Gate()
    with background(delay=gate):
        training = Training(nn.Linear(17, 3))
        average = Average(training.model, SWA(), device="cpu")
        average.attach(training.optimizer)
        training.steps(1)  # the update has returned, though its thread waits
        first = training.model.weight.detach().clone()
        step = running(lambda: training.steps(1))
        step.join(0.1)
        assert step.is_alive()
        assert torch.equal(training.model.weight, first)
        gate.open.set()
        step.join(30)
        assert not torch.equal(training.model.weight, first)
        expected = (first + training.model.weight) / 2
        torch.testing.assert_close(average.averaged_tensors()["weight"], expected)


@pytest.mark.parametrize("read", ["averaged_tensors", "state_dict", "metrics", "lend", "save"])
def test_arithmetic_keeps_readers_waiting_and_no_step(read, monkeypatch, tmp_path):
    gate = Gate()
    lerp = blend.lerp_

    def late_lerp(*arguments):
        gate()
        lerp(*arguments)

    with background(ring_bytes=1 << 20):
        training = Training(nn.Linear(17, 3))
        average = Average(training.model, SWA(), device="cpu")
        average.attach(training.optimizer)
        monkeypatch.setattr(blend, "lerp_", late_lerp)
        training.steps(1)
        assert gate.reached.wait(30)
        training.steps(1)  # what it overwrites has been read
        arguments = [tmp_path / "average.safetensors"] if read == "save" else []
        reader = running(lambda: getattr(average, read)(*arguments))
        reader.join(0.1)
        assert reader.is_alive()
        gate.open.set()
        reader.join(30)
        assert not reader.is_alive()


class Fails(RuntimeError):
    """What the thread meets."""


def failing_at(monkeypatch, *numbers):
    """The updates of these numbers fail in the middle."""
    calls = []
    lerp = blend.lerp_

    def failing(averages, sources, weight):
        calls.append(weight)
        if len(calls) in numbers:
            raise Fails("no memory")
        lerp(averages, sources, weight)

    monkeypatch.setattr(blend, "lerp_", failing)


CALLS = {
    "step": lambda training, average: training.steps(1),
    "applied": lambda training, average: average.lend(),
    "state_dict": lambda training, average: average.state_dict(),
    "averaged_tensors": lambda training, average: average.averaged_tensors(),
    "metrics": lambda training, average: average.metrics(),
    "copy_to": lambda training, average: average.copy_to(training.model),
    "deepcopy": lambda training, average: copy.deepcopy(average),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_error_of_the_thread_is_raised_once_by_the_next_call(call, monkeypatch):
    with background(group_values=1 << 20):
        training = Training(nn.Linear(17, 3))
        average = Average(training.model, SWA(), device="cpu")
        average.attach(training.optimizer)
        training.steps(3)
        saved = states(average)
        failing_at(monkeypatch, 1)
        training.steps(1)
        average._tracker._background.wait()
        with pytest.raises(
            UsageError, match=r"(?s)failed in the background: Fails: no memory.*reset"
        ) as found:
            CALLS[call](training, average)
        assert isinstance(found.value.__cause__, Fails)
        assert average.count == 3
        assert average.time == 3.0
        average.load_state_dict(saved)
        training.steps(2)
        assert average.count == 5
        average.averaged_tensors()


def test_after_an_error_nothing_is_counted_that_was_not_done(monkeypatch):
    gate = Gate()
    with background(delay=gate, group_values=1 << 20):
        training = Training(nn.Linear(17, 3))
        averages = Averages(training.model, {"one": SWA(), "other": SWA()}, device="cpu")
        averages["one"].attach(training.optimizer)
        averages["other"].attach(training.optimizer)
        failing_at(monkeypatch, 1)
        training.steps(1)  # two updates: the second is of the other average
        gate.open.set()
        with pytest.raises(UsageError, match="background"):
            averages["other"].averaged_tensors()
        assert [average.count for average in averages.values()] == [0, 0]
        training.steps(2)
        expected = training.model.weight.detach()
        assert averages["one"].count == 2
        assert averages["one"].averaged_tensors()["weight"].shape == expected.shape


def test_an_error_in_training_leaves_the_average_whole():
    with background():
        training = Training(nn.Linear(17, 3))
        average = Average(training.model, SWA(), device="cpu")
        seen = []
        with pytest.raises(ZeroDivisionError), average.attach(training.optimizer):
            for i in range(4):
                training.steps(1)
                seen.append(training.model.weight.detach().clone())
                1 / (2 - i)
        found = average.averaged_tensors()["weight"]
        torch.testing.assert_close(found, torch.stack(seen).mean(0))


def test_nonfinite_weights_are_refused_before_anything_is_begun():
    with background():
        training = Training(nn.Linear(17, 3))
        average = Average(training.model, SWA(), device="cpu", nonfinite="raise")
        average.update()
        training.model.weight.data[0, 0] = torch.inf
        with pytest.raises(NonFiniteError, match="weight"):
            average.update()
        assert average.count == 1
        average.averaged_tensors()


def clip(training):
    with torch.no_grad():
        training.model.weight.clamp_(-0.1, 0.1)


def restore(training):
    training.model.load_state_dict(training.model.state_dict())


@pytest.mark.parametrize("write", [clip, restore])
def test_writes_that_nothing_orders_are_said_once_and_waited_for_then(write):
    with background():
        training = Training(nn.Linear(17, 3))
        average = Average(training.model, SWA(), device="cpu")
        average.attach(training.optimizer)
        training.steps(1)
        write(training)
        with pytest.warns(
            PolyakWarning, match=r"^weight.* before_next_step|weight.*before_next_step"
        ):
            training.steps(1)
        average.reset()
        seen = []
        for _ in range(3):  # an error, if it were said again
            training.steps(1)
            seen.append(training.model.weight.detach().clone())
            write(training)
        found = average.averaged_tensors()["weight"]
        torch.testing.assert_close(found, torch.stack(seen).mean(0))


def test_a_copy_is_complete_and_goes_on_by_itself():
    with background():
        training = Training()
        averages = averages_of(training.model)
        averages.attach(training.optimizer, by_hand=True)
        for _ in range(3):
            training.steps(1)
            averages.update()
        averages.detach()
        for copied in (copy.deepcopy(averages), pickle.loads(pickle.dumps(averages))):
            assert_same(states(copied), states(averages))
            copied.update()
            copied["swa"].averaged_tensors()
            assert copied["swa"].count == 4
        assert averages["swa"].count == 3


@pytest.mark.parametrize("n_values", [10, 1 << 14])
def test_no_more_is_on_the_host_than_said(n_values):
    with background(ring_bytes=1 << 13, group_values=256):
        model = nn.ParameterList(torch.ones(n_values) for _ in range(5))
        averages = averages_of(model)
        averages.update()
        averages.update()
        averages["swa"].averaged_tensors()
        room = averages._tracker._background.read._room
        assert 0 < room.numel() <= 1 << 13


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_what_is_complete():
    with background():
        training = Training(nn.Linear(17, 3))
        average = Average(training.model, SWA(), device="cpu")
        average.attach(training.optimizer)
        training.steps(5)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # Python 3.12, of forks beside threads
            child = os.fork()
        if child == 0:
            code = 1
            signal.alarm(60)
            try:
                training.steps(2)
                code = 0 if average.count == 7 and average.averaged_tensors() else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        training.steps(2)
        assert average.count == 7
        average.averaged_tensors()


PROGRAM = """
    import atexit, os, sys, time
    import torch
    from torch import nn
    from reference.in_background import background
    import polyak

    def slowly(job):
        time.sleep(0.3)
        return job()

    def begin():
        background(delay=slowly).__enter__()
        model = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        average = polyak.Average(model, polyak.SWA(), device="cpu")
        average.attach(optimizer)

        def step():
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()

        step()
        return average, step

    torch.optim.SGD(nn.Linear(1, 1).parameters())  # imports for seconds, once
    folder, *ends = sys.argv[1:]
    for number, end in enumerate(ends):
        if (child := os.fork()) == 0:
            out = os.open(f"{folder}/{number}", os.O_WRONLY | os.O_CREAT)
            os.dup2(out, 1)
            os.dup2(out, 2)
            average, step = begin()
            exec(end)
            sys.exit()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
ENDS = {
    "print('end')": (0, "end"),
    "raise ZeroDivisionError('of training')": (1, "ZeroDivisionError: of training"),
    "sys.exit(3)": (3, ""),
    "atexit.register(lambda: (step(), step(), print(average)))": (0, "count=3"),
    "raise KeyboardInterrupt": (None, "KeyboardInterrupt"),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_ends_though_work_is_pending(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), tmp_path, *ENDS],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    codes = list(map(int, done.stdout.split()))
    for number, (code, said) in enumerate(ENDS.values()):
        output = (tmp_path / str(number)).read_text()
        assert said in output
        assert "polyak-average" not in output  # no complaint of its thread
        assert code is None or codes[number] == code, output


def test_nothing_is_left_of_an_average_that_nobody_has():
    gc.collect()
    before = set(threading.enumerate())
    with background():
        plain(Training())
        threads = set(threading.enumerate()) - before
        assert len(threads) == 1
        for _ in range(100):
            gc.collect()
            for thread in threads:
                thread.join(0.1)
            if not any(thread.is_alive() for thread in threads):
                return
        raise AssertionError(threads)
