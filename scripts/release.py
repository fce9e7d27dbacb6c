#!/usr/bin/env python
"""Builds the sdist and the wheel, and uses them as somebody does who has nothing else: the wheel is installed in a new
virtual environment, then the sdist in its place, and the programs of each run in an empty folder. Needs the package
`build`, and the network or a cache of pip.

python scripts/release.py --output_dir dist
"""

import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from hf_relpos import __version__
from hf_relpos.cli import command, parse_arguments


ROOT = Path(__file__).parent.parent
MODEL = "--pos_embedding_type linear_cpb --config_overrides hidden_size=64,num_hidden_layers=2,num_attention_heads=2"
COMMANDS = (
    "hf-relpos --version",
    f"hf-relpos train {MODEL} --vocab_size 1024 --block_size 64 --max_steps 20 --output_dir output/model",
    "hf-relpos evaluate --model_name_or_path output/model --eval_lengths 64 128 --max_windows 8 --output_dir output/e",
    "hf-relpos generate --model_name_or_path output/model --prompt Fellow --max_new_tokens 8",
    "python remote_code.py",
    "python native.py",
    "hf-relpos push output/model somebody/model --dry_run true --output_dir output/preview",
)
# of the wheel alone: it takes what it is allowed
COMPARISON = "hf-relpos compare --schemes none alibi --train_length 32 --run_length 64 --seeds 2 --budget {}"
PROGRAMS = {
    "remote_code.py": """
import sys
sys.modules["hf_relpos"] = None  # as on a machine that does not have it
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("output/model", trust_remote_code=True)
tokens = AutoTokenizer.from_pretrained("output/model")("Fellow citizens", return_tensors="pt")
print(type(model).__module__, float(model(**tokens, labels=tokens["input_ids"]).loss))
""",
    "native.py": """
from pathlib import Path
import hf_relpos.native
from hf_relpos.native.build import build
hf_relpos.native.load()
print(build(), "of", Path(hf_relpos.native.__file__).parent)
assert "site-packages" in hf_relpos.native.__file__
""",
}


def build_both(folder: Path) -> tuple[Path, Path]:
    """→ the wheel, built from the sdist, and the sdist."""
    run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)])
    (wheel,), (sdist,) = folder.glob(f"*-{__version__}-*.whl"), folder.glob(f"*-{__version__}.tar.gz")
    return wheel, sdist


def missing_files(wheel: Path) -> list[str]:
    """What git has of the package and the wheel has not."""
    listed = subprocess.run(["git", "ls-files", "hf_relpos"], cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted({*listed.stdout.split()} - {*zipfile.ZipFile(wheel).namelist()})


def use(archive: Path, folder: Path, lines: tuple[str, ...], *options: str) -> None:
    """Installs an archive in the environment of a folder and runs commands in an empty folder."""
    programs = folder / "venv" / "bin"
    # without the paths and caches of whoever calls, so that the kernel is built from the sources that were installed
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "XDG_"))}
    environment = kept | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    pip = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options]
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    run([*pip, *constraints, f"hf_relpos[sample] @ {archive.resolve().as_uri()}"], cwd=folder, env=environment)
    place = folder / archive.name.replace(".", "-")
    place.mkdir()
    for name, text in PROGRAMS.items():
        (place / name).write_text(text, encoding="utf-8")
    for line in lines:
        print(f"$ {line}", flush=True)
        output = run(line.split(), cwd=place, env=environment | {"HOME": str(place)})
        print("\n".join(output.splitlines()[-3:]), flush=True)
        if "--version" in line and not re.search(rf"\b{re.escape(__version__)}$", output.strip()):
            raise ValueError(f"the version is {__version__!r}, got {output.strip()!r}.")


def run(words: list[str], **options: object) -> str:
    """→ what a command prints; raises `ValueError` with the end of it if it fails."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if done.returncode:
        raise ValueError(f"{' '.join(words)!r} failed with code {done.returncode}: {done.stdout[-1500:]}")
    return done.stdout


@dataclass
class ReleaseArguments:
    """Where the archives go, and how long the comparison may take."""

    output_dir: str = field(default="dist", metadata={"help": "Folder of the wheel and the sdist."})
    budget: str = field(default="6min", metadata={"help": "Time of `hf-relpos compare`; more on a busy machine."})


@command
def main() -> None:
    (args,) = parse_arguments((ReleaseArguments,), __doc__)
    archives = build_both(Path(args.output_dir))
    if missing := missing_files(archives[0]):
        raise ValueError(f"{archives[0].name!r} lacks {missing}: name them in `package_data` of setup.py.")
    with tempfile.TemporaryDirectory() as name:
        venv.create(Path(name) / "venv", with_pip=True)
        for archive, lines, options in (
            (archives[0], (*COMMANDS, COMPARISON.format(args.budget)), ()),
            (archives[1], COMMANDS, ("--force-reinstall", "--no-deps")),
        ):
            print(f"{archive.name}: {archive.stat().st_size / 1000:.0f} kB, installed and used", flush=True)
            use(archive, Path(name), lines, *options)
    print(f"wrote {', '.join(map(str, archives))}: both were installed and used")


if __name__ == "__main__":
    main()
