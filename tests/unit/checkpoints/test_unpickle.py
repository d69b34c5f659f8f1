"""The reader of pickles: what Python writes, what nobody should, and its bounds."""

import argparse
import collections
import contextlib
import pickle
import pickletools
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak.checkpoints.reading.inert import Global, Stub
from polyak.checkpoints.reading.pickle_machine import MAX_STACK
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


class Runs:
    """What pickle would run on loading."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


def test_nothing_is_run_or_imported(tmp_path):
    marker = tmp_path / "marker"
    data = pickle.dumps(Runs(open, str(marker), "w"))
    pickle.loads(data).close()
    assert marker.exists()
    marker.unlink()
    found = read_pickle(data, "test")
    assert found.name in ("io.open", "_io.open")
    assert not marker.exists()
    assert "antigravity" not in sys.modules
    read_pickle(b"\x80\x04\x8c\x0bantigravity\x8c\x01x\x93.", "test")
    assert "antigravity" not in sys.modules


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


HOSTILE = {
    "a memo index of four billion": b"\x80\x02Nr\xff\xff\xff\xff.",
    "text of four gigabytes": b"\x80\x02X\xff\xff\xff\xff.",
    "text of 2^63 bytes": b"\x80\x04\x8d" + b"\xff" * 8 + b".",
    "bytes of 2^63": b"\x80\x04\x8e" + b"\xff" * 8 + b".",
    "a bytearray of 2^63": b"\x80\x05\x96" + b"\xff" * 8 + b".",
    "an integer of four gigabytes": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "an integer of 255 bytes": b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".",
    "a frame of 2^63": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
    "marks only": b"(" * 100_010,
    "lists only": b"]" * (MAX_STACK + 10),
    "duplicates only": b"N" + b"2" * (MAX_STACK + 10),
    "deep lists": b"]" * 240_000 + b"a" * 239_999 + b".",
    "deep tuples": b")" + b"\x85" * 300_000 + b".",
    "billion laughs": b")" + b"\x94" + b"".join(b"2\x86" for _ in range(1000)) + b".",
    "a tuple of laughs as key": b"}" + b"NN\x86" + b"2\x86" * 100 + b"Ns.",
    "a list as key": b"}]Ns.",
    "nothing": b"",
    "no stop": b"\x80\x02N",
    "stop on nothing": b".",
    "pop on nothing": b"0.",
    "append to a number": b"K\x01Na.",
    "items for a number": b"K\x01(NNu.",
    "an odd number of items": b"}(NNNu.",
    "a tuple without a mark": b"t.",
    "a call without arguments": b"cos\nsystem\nNR.",
    "a call of a number": b"K\x01)R.",
    "build of nothing": b"Nb.",
    "a memo entry never written": b"h\x05.",
    "a name without an end": b"c" + b"a" * 100_000,
    "a name that is not text": b"\x80\x04NN\x93.",
    "text that is not text": b"X\x02\0\0\0\xff\xfe.",
    "a persistent id": b"NQ.",
    "protocol 6": b"\x80\x06N.",
    "an extension code": b"\x82\x01.",
    "an instance, the old way": b"(ios\nsystem\n.",
    "a next buffer": b"\x80\x05\x97.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_end_in_a_value_or_an_error(name):
    try:
        found = read_pickle(HOSTILE[name], "test")
    except FormatError as error:
        assert "test" in str(error)
    else:
        assert name in (
            "a memo index of four billion",
            "a frame of 2^63",
            "deep lists",
            "deep tuples",
            "billion laughs",
            "a tuple of laughs as key",
            "a call of a number",
            "an instance, the old way",
        )
        del found


def test_hostile_pickles_take_little_memory_and_time():
    """All of them in one process that may have 1 GB, in a time that a person would wait."""
    code = (
        "import resource, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from polyak.checkpoints.reading.pickle_reader import read_pickle\n"
        "from polyak.errors import FormatError\n"
        "limit = 1 << 30\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "for data in eval(sys.stdin.read()):\n"
        "    try:\n"
        "        read_pickle(data, 'test')\n"
        "    except FormatError:\n"
        "        pass\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, "."],
        input=repr(list(HOSTILE.values())).encode(),
        check=True,
        timeout=120,
    )


def test_a_long_pickle_is_refused_unread():
    with pytest.raises(FormatError, match="bytes of pickle"):
        read_pickle(bytes((128 << 20) + 1), "test")


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
