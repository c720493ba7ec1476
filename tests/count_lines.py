"""Lines of product code, and of the files that one step of GRPO + minillm runs through.

    python tests/count_lines.py            both (the second by a run of one step on the tiny demo, about a minute)
    python tests/count_lines.py --product  the first alone

The second is found, not listed: a profile function in the trainer's process notes each file of ours that a function is
called from while the loop trains, without the teacher's server and without what runs before and after.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "inference", "rewards", "training", "eval", "slurm")
DRIVER = """
import os, sys
ROOT, OUT = {root!r}, {out!r}
sys.path.insert(0, ROOT)
import training.loop as loop

seen, whole = set(), loop.train

def note(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(ROOT) and code.co_name != "<module>":
        seen.add(code.co_filename)

def train(run, progress):
    sys.setprofile(note)
    try:
        return whole(run, progress)
    finally:
        sys.setprofile(None)
        open(OUT, "w").write("\\n".join(sorted(seen)))

loop.train = train
from training.main import main
os._exit(main(sys.argv[1:]))
"""


def product_files() -> list[Path]:
    """Python and shell files of the product's folders, and its page templates."""
    endings = (".py", ".sh", ".html", ".j2")
    return sorted(f for folder in FOLDERS for f in (ROOT / folder).rglob("*") if f.suffix in endings and f.is_file())


def lines(files: list[Path]) -> int:
    """Lines of all of them."""
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def step_files() -> list[Path]:
    """Files that one step runs through."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "files"
        sys.path.insert(0, str(ROOT))
        from tests.support.runs import command, environment

        flags = command(Path(folder) / "runs", Path(folder) / "cache", "--steps", "1", "--eval.questions", "2")[2:]
        driver = [sys.executable, "-c", DRIVER.format(root=str(ROOT), out=str(out)), *flags]
        subprocess.run(driver, cwd=ROOT, env=environment(), check=True, capture_output=True)
        found = [Path(line) for line in out.read_text().splitlines()]
        return [file for file in found if file.relative_to(ROOT).parts[0] in FOLDERS]


def main() -> None:
    """Print what was asked for."""
    print(f"{lines(product_files()):,} lines of product code in {len(product_files())} files")
    if "--product" not in sys.argv:
        files = step_files()
        print(f"{lines(files):,} lines in the {len(files)} files that one step of GRPO + minillm runs through:")
        for file in files:
            print(f"  {lines([file]):5} {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
