"""The reader of pickles: what Python writes, what nobody should, and its bounds."""

import argparse
import collections
import contextlib
import pickle
import pickletools
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak.checkpoints.reading import pickle_machine, pickle_reader
from polyak.checkpoints.reading.inert import Global, Stub
from polyak.checkpoints.reading.pickle_reader import read_pickle
from polyak.errors import FormatError

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**100), 2**100)
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
    | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner, max_size=5)
        | st.tuples(inner, inner)
        | st.tuples(inner, inner, inner, inner)
    ),
    max_leaves=30,
)


@given(PLAIN, st.sampled_from([0, 1, 2, 3, 4, 5]))
def test_plain_values_come_back(value, protocol):
    assert read_pickle(pickle.dumps(value, protocol), "test") == value


@given(PLAIN)
def test_optimised_pickles_too(value):
    assert read_pickle(pickletools.optimize(pickle.dumps(value, 4)), "test") == value


def test_sharing_is_kept():
    shared = [1]
    first, second = read_pickle(pickle.dumps([shared, shared]), "test")
    assert first is second
    loop = []
    loop.append(loop)
    found = read_pickle(pickle.dumps(loop), "test")
    assert found[0] is found


def test_containers_of_the_standard_library():
    assert read_pickle(pickle.dumps(collections.OrderedDict(a=1, b=2)), "test") == {"a": 1, "b": 2}
    assert read_pickle(pickle.dumps(collections.defaultdict(list, a=[1])), "test") == {"a": [1]}
    for protocol in (2, 4):
        assert sorted(read_pickle(pickle.dumps({1, 2, 3}, protocol), "test")) == [1, 2, 3]
        assert sorted(read_pickle(pickle.dumps(frozenset({1, 2}), protocol), "test")) == [1, 2]


def test_an_ordered_dict_as_python_2_writes_it():
    data = b"ccollections\nOrderedDict\n((l(lU\x01aaI1\naa(lU\x01baI2\naatR."
    assert read_pickle(data, "test") == {"a": 1, "b": 2}
    for odd in (b"I1\n", b"(lI1\na", b"(l(lI1\naa", b"(l(l(taI2\naa"):
        found = read_pickle(b"ccollections\nOrderedDict\n(" + odd + b"tR.", "test")
        assert isinstance(found, Stub), odd


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_become_stubs(protocol):
    found = read_pickle(pickle.dumps(argparse.Namespace(rate=0.1), protocol), "test")
    assert isinstance(found, Stub)
    assert found.name == "argparse.Namespace"
    assert found.state == {"rate": 0.1}


def test_lines_of_protocol_0_and_objects_of_python_2():
    lines = b"(I01\nI-7\nL12L\nF2.5\nS'a\\x41\\n\\\\'\nV\\u00e9 \ng0\n(S'k'\nNdl."
    assert read_pickle(b"Np0\n0" + lines, "test") == [
        True, -7, 12, 2.5, "aA\n\\", "\u00e9 ", None, {"k": None}
    ]  # fmt: skip
    old = read_pickle(b"(cmodule\nName\nI1\no}S'x'\nI2\nsb.", "test")
    assert (old.name, old.args, old.state) == ("module.Name", (1,), {"x": 2})
    instance = read_pickle(b"(I1\nimodule\nName\n.", "test")
    assert (instance.name, instance.args) == ("module.Name", (1,))
    assert read_pickle(b"U\x02\xc3\xa9.", "test") == "\u00e9"
    assert read_pickle(b"U\x01\xe9.", "test") == "\u00e9"
    assert read_pickle(b"P12\n.", "test", persistent=lambda text: [text]) == ["12"]


@pytest.mark.parametrize(
    "data",
    [
        b"I1_0\n.", b"I 1\n.", b"I" + b"1" * 40 + b"\n.", b"L1", b"Lx\n.", b"F1x\n.", b"S'a\n.",
        b"Sa\n.", b"S\n.", b"V\\ud800\n.", b"V\\u12\n.", b"gx\n.", b"g7\n.", b"Np-x\n.", b"(o.",
        b"(I1\no.", b"(I1\nd.", b"P1\n.", b"i", b"(imodule\n", b"d.",
    ],
)  # fmt: skip
def test_lines_that_nobody_writes(data):
    with pytest.raises(FormatError, match="test, byte"):
        read_pickle(data, "test")


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """A module whose import can be seen, and which does nothing else."""
    name = "recorder_of_test_unpickle"
    (tmp_path / f"{name}.py").write_text("calls = []\ndef record(*args): calls.append(args)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


CALLS = {
    "by lines": "\x80\x02c{0}\nrecord\n)R.",
    "by the stack": "\x80\x04\x8c\x19{0}\x8c\x06record\x93)R.",
    "the old way": "(i{0}\nrecord\n.",
    "an object": "(c{0}\nrecord\no.",
    "a new object": "\x80\x02c{0}\nrecord\n)\x81.",
    "named only": "c{0}\nrecord\n.",
}


@pytest.mark.parametrize("how", CALLS)
def test_nothing_is_run_or_imported(recorder, how):
    data = CALLS[how].format(recorder).encode("latin-1")
    with contextlib.suppress(TypeError, pickle.UnpicklingError):  # what is called is no class
        pickle.loads(data)
    assert recorder in sys.modules, "Python's own would have imported it"
    del sys.modules[recorder]
    found = read_pickle(data, "test")
    assert found.name == f"{recorder}.record"
    assert recorder not in sys.modules


# Bounds so low that what goes beyond them harms nobody, whoever reads it.
BOUNDS = {"MAX_PICKLE_BYTES": 10_000, "MAX_OPCODES": 6_000, "MAX_STACK": 2_500, "MAX_MARKS": 50}


@pytest.fixture
def bounds(monkeypatch):
    for name, value in BOUNDS.items():
        lowered = [m for m in (pickle_machine, pickle_reader) if hasattr(m, name)]
        assert lowered, name
        for module in lowered:
            monkeypatch.setattr(module, name, value)


def little(number, size):
    return number.to_bytes(size, "little")


LEFT = "100 bytes expected, 1 are left"  # said before any room is made for them
HOSTILE = {
    # lengths of more than there is
    "text": (b"\x80\x02X" + little(100, 4) + b".", LEFT),
    "long text": (b"\x80\x04\x8d" + little(100, 8) + b".", LEFT),
    "short text": (b"\x80\x04\x8c" + little(100, 1) + b".", LEFT),
    "old bytes": (b"\x80\x02T" + little(100, 4) + b".", LEFT),
    "bytes": (b"\x80\x03B" + little(100, 4) + b".", LEFT),
    "long bytes": (b"\x80\x04\x8e" + little(100, 8) + b".", LEFT),
    "a bytearray": (b"\x80\x05\x96" + little(100, 8) + b".", LEFT),
    "a long integer": (b"\x80\x02\x8b" + little(100, 4) + b".", LEFT),
    "an integer of 17 bytes": (b"\x80\x02\x8a\x11" + b"\x01" * 17 + b".", "an integer of 17 bytes"),
    # more than the bounds
    "bytes of pickle": (b"N0" * 6_000, "12000 bytes of pickle; at most 10000"),
    "opcodes": (b"N0" * 3_010 + b"N.", "more than 6000 opcodes"),
    "marks only": (b"(" * 60, "more than 50 containers are open"),
    "lists only": (b"]" * 2_510, "more than 2500 objects wait on the stack"),
    "duplicates only": (b"N" + b"2" * 2_510, "more than 2500 objects wait on the stack"),
    "a name without an end": (b"c" + b"a" * 1_100, "a line without an end"),
    # what is not a pickle
    "a list as key": (b"}]Ns.", "a list as the key of a dict"),
    "nothing": (b"", "it ends in the middle"),
    "no stop": (b"\x80\x02N", "it ends in the middle"),
    "stop on nothing": (b".", "more from the stack than is there"),
    "pop on nothing": (b"0.", "more from the stack than is there"),
    "append to a number": (b"K\x01Na.", "items for a int"),
    "items for a number": (b"K\x01(NNu.", "keys for a int"),
    "an odd number of items": (b"}(NNNu.", "a key without a value"),
    "a tuple without a mark": (b"t.", "more from the stack than is there"),
    "a call without arguments": (b"cstring\ncapwords\nNR.", "arguments are not a tuple"),
    "build of nothing": (b"Nb.", "more from the stack than is there"),
    "a memo entry never written": (b"h\x05.", "memo entry 5 was never written"),
    "a name that is not text": (b"\x80\x04NN\x93.", "a global whose name is not text"),
    "text that is not text": (b"X\x02\0\0\0\xff\xfe.", "text that is not UTF-8"),
    "a persistent id": (b"NQ.", "a persistent id, where none is expected"),
    "protocol 6": (b"\x80\x06N.", "a protocol after 5"),
    "an extension code": (b"\x82\x01.", "not one that checkpoints hold"),
    "a next buffer": (b"\x80\x05\x97.", "not one that checkpoints hold"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.usefixtures("bounds")
def test_hostile_pickles_are_refused(name):
    data, reason = HOSTILE[name]
    with pytest.raises(FormatError, match=rf"^test.*{reason}"):
        read_pickle(data, "test")


def depth(value):
    """How deep the first elements of containers are nested."""
    found = 0
    while value:
        found, value = found + 1, value[0]
    return found


@pytest.mark.usefixtures("bounds")
def test_deep_containers_are_read_without_recursion():
    assert sys.getrecursionlimit() <= 2_000
    assert depth(read_pickle(b"]" * 2_000 + b"a" * 1_999 + b".", "test")) == 1_999
    assert depth(read_pickle(b")" + b"\x85" * 2_000 + b".", "test")) == 2_000


def test_a_memo_has_room_for_what_was_written_only():
    machine = pickle_machine.PickleMachine(b"Nr" + little(70_000, 4) + b".", "test", None, None)
    assert machine.run(pickle_reader.OPERATIONS) is None
    assert machine.memo == {70_000: None}


def test_a_frame_is_no_promise():
    assert read_pickle(b"\x80\x04\x95" + little(100, 8) + b"N.", "test") is None


def test_shared_tuples_are_never_hashed():
    """Each doubles the work of hashing the one below it: as keys they become stubs."""
    doubled = b"NN\x86" + b"2\x86" * 5
    (key,) = read_pickle(b"}" + doubled + b"Ns.", "test")
    assert isinstance(key, Stub)
    assert key.name == "builtins.tuple"
    assert read_pickle(b"}NN\x86Ns.", "test") == {(None, None): None}
    assert depth(read_pickle(doubled + b".", "test")) == 6


def test_odd_calls_become_stubs():
    assert read_pickle(b"K\x01)R.", "test").name == "int"
    assert read_pickle(b"(istring\ncapwords\n.", "test").name == "string.capwords"


@given(st.binary(max_size=200))
def test_random_bytes(data):
    with contextlib.suppress(FormatError):
        read_pickle(data, "test")


@given(PLAIN, st.data())
def test_changed_bytes(value, data):
    raw = bytearray(pickle.dumps({"a": value, "b": argparse.Namespace(x=[value])}, 4))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError):
        read_pickle(bytes(raw), "test")


def test_globals_are_names():
    found = read_pickle(pickle.dumps([print, argparse.Namespace]), "test")
    assert [type(item) for item in found] == [Global, Global]
    assert found[1].name == "argparse.Namespace"
