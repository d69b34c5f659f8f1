"""Changed, cut and spliced files of every format: a checkpoint or a PolyakError, nothing else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.mutated import read_dcp_everything, read_everything, real_dcp, real_files

FILES = real_files()
NAMES = sorted(FILES)
INTERESTING = [0, 1, 2, 0x7F, 0x80, 0xFF, ord("("), ord("t"), ord("."), ord("R"), ord("]")]


@pytest.mark.parametrize("name", NAMES)
def test_unchanged(name):
    assert read_everything(FILES[name])


@pytest.mark.parametrize("name", NAMES)
def test_cut_at_every_place(name):
    data = FILES[name]
    for length in range(0, len(data), max(1, len(data) // 700)):
        read_everything(data[:length])
    assert not any(read_everything(data[:length]) for length in range(0, len(data) - 1, 101))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=400)
@given(data=st.data())
def test_changed_bytes(name, data):
    raw = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.sampled_from(INTERESTING) | st.integers(0, 255))
    read_everything(bytes(raw))


@settings(max_examples=400)
@given(st.sampled_from(NAMES), st.sampled_from(NAMES), st.data())
def test_spliced_files(first, second, data):
    head, tail = FILES[first], FILES[second]
    cut, join = data.draw(st.integers(0, len(head))), data.draw(st.integers(0, len(tail)))
    read_everything(head[:cut] + tail[join:])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200)
@given(data=st.data())
def test_moved_and_repeated_pieces(name, data):
    raw = FILES[name]
    start = data.draw(st.integers(0, len(raw)))
    piece = raw[start : start + data.draw(st.integers(1, 40))]
    place = data.draw(st.integers(0, len(raw)))
    if data.draw(st.booleans()):
        read_everything(raw[:place] + piece * data.draw(st.integers(1, 5)) + raw[place:])
    else:
        read_everything(raw[:place] + piece + raw[place + len(piece) :])


@pytest.fixture(scope="module")
def dcp_files():
    return real_dcp()


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=500)
@given(data=st.data())
def test_changed_bytes_of_a_dcp_folder(dcp_files, data):
    assert read_dcp_everything(dcp_files)
    files = {name: bytearray(raw) for name, raw in dcp_files.items()}
    for _ in range(data.draw(st.integers(1, 6))):
        raw = files[data.draw(st.sampled_from([".metadata", ".metadata", "__0_0.distcp"]))]
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.sampled_from(INTERESTING) | st.integers(0, 255))
    read_dcp_everything({name: bytes(raw) for name, raw in files.items()})


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_random_bytes(data):
    read_everything(data)
