"""The beginning of a program that reads a tensor of a safetensors file with the standard library alone.

Programs that judge weights are started once for each evaluation, and torch alone takes seconds to import.
"""

READS = '''
import json
import struct
import sys


def read(path, name):
    """The dtype and the values, of float32 or bfloat16."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        said = json.loads(file.read(size))[name]
        begin, end = said["data_offsets"]
        file.seek(8 + size + begin)
        raw = file.read(end - begin)
    if said["dtype"] == "BF16":
        raw = b"".join(bytes(2) + raw[i : i + 2] for i in range(0, len(raw), 2))
    return said["dtype"], struct.unpack(f"<{len(raw) // 4}f", raw)

'''
