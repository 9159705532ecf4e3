"""Bytes that are led by the branches they reach: `python -m bench.fuzz_guided --seconds 300`.

As the kind `bytes` of `bench.fuzz`, but by atheris (libFuzzer), which is no dependency: install it
in an environment of its own. Inputs start from the sound files of every format; the first byte
chooses the name under which the others are read. An exception that is not the project's own ends
the run with its input. Files of inputs that reached something new stay in `--corpus`.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path


def main() -> None:
    """Run as told by `--help`; libFuzzer prints its figures and ends the process."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz_guided", description=__doc__)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--corpus", type=Path, default=Path("fuzz_corpus"))
    asked = parser.parse_args()
    import atheris

    with atheris.instrument_imports(include=["instructmining_core.data"]):
        from instructmining_core.config import InstructMiningError
        from instructmining_core.data.records import iter_rows, row_hash

        from .fuzz import sound_files
    files = {name: content for name, content in sound_files().items()
             if not name.startswith("bomb")}  # fmt: skip

    def read(content: bytes) -> None:
        """Read the bytes behind the first as a file, and hash what they hold; or refuse."""
        if not content:
            return
        name = list(files)[content[0] % len(files)]
        try:
            for _, _, talks in iter_rows(name, stdin=io.BytesIO(content[1:])):
                for talk in talks:
                    row_hash(talk)
        except InstructMiningError:
            pass

    asked.corpus.mkdir(parents=True, exist_ok=True)
    for number, (name, content) in enumerate(files.items()):
        (asked.corpus / name).write_bytes(bytes([number]) + content)
    limits = [f"-max_total_time={asked.seconds}", "-timeout=20", "-rss_limit_mb=1024",
              "-print_final_stats=1"]  # fmt: skip
    atheris.Setup([sys.argv[0], *limits, str(asked.corpus)], read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
