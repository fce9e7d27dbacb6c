"""The program `hf-relpos`, and what its sub-commands share: flags from dataclasses with a YAML file under them, files
that register schemes, and one line for a user's error."""

import functools
import json
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from .command_help import flag_hint, make_parser, nearest
from .environment import is_first_process, write_error
from .file_reading import read_yaml, reason
from .messages import say_command


PROGRAM = "hf-relpos"
# sub-command → the function that it runs and what it does, in the order in which one uses them; each module is imported
# when its sub-command is called
COMMANDS = {
    "schemes": ("hf_relpos.cli:schemes_main", "list the position schemes"),
    "check": ("hf_relpos.check_command:main", "try a position scheme on a tiny model: causality, padding, caches"),
    "compare": ("hf_relpos.experiments.commands:compare_main", "train several schemes on a text and say which is best"),
    "train": ("hf_relpos.training.commands:train_main", "train a model with a position scheme"),
    "import": ("hf_relpos.pretrained.commands:import_main", "make a pretrained model of another family one of this"),
    "finetune": (
        "hf_relpos.training.commands:finetune_main",
        "continue training at another length or with another scheme",
    ),
    "evaluate": ("hf_relpos.evaluation.command:main", "measure the loss by length and by position, or score a task"),
    "generate": ("hf_relpos.inference.command:main", "generate text from a prompt or a file of prompts"),
    "demo": ("hf_relpos.demo.command:main", "show saved models side by side in the browser"),
    "sweep": ("hf_relpos.experiments.commands:sweep_main", "run the grid of trainings that a YAML file states"),
    "report": ("hf_relpos.results.report:main", "make tables, plots and statistics of results"),
    "push": ("hf_relpos.hub.command:main", "publish a saved model on the Hub, with its card"),
    "serve": ("hf_relpos.inference.serve:main", "answer requests as OpenAI's API does"),
    "export": ("hf_relpos.pretrained.commands:export_main", "write a model with rotary positions as a Llama"),
}
IMPORT_FILE = "import_file"
IMPORT_FLAGS = ("--import_file", "--import-file")
DEBUG = "HF_RELPOS_DEBUG"
OPTIONAL = ("peft", "torchao", "sklearn", "pandas")
MAX_LINE = 1500  # characters of an error: a value may be of any length
IMPORT_HELP = "Python files that register position schemes."


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Decorator of a program's `main`: an error becomes one line on stderr and exit code 2.

    With `--debug` on the command line, or the environment variable `HF_RELPOS_DEBUG`, its traceback stands before it.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        debug = _pop_debug(sys.argv) or os.environ.get(DEBUG, "0") not in ("", "0")
        try:
            main()
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
            sys.exit(128 + signal.SIGPIPE)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            if is_first_process():
                if debug:
                    traceback.print_exc()
                print(f"{Path(sys.argv[0]).name}: error: {describe(error)}", file=sys.stderr)
            sys.exit(2)
        finally:
            torch = sys.modules.get("torch")
            if torch and torch.distributed.is_initialized():  # its threads abort a process that ends while they run
                torch.distributed.destroy_process_group()

    return wrapped


def describe(error: Exception) -> str:
    """An error in one line: what is wrong with what was given, or else where in the package nobody foresaw it."""
    cause = write_error(error)
    if cause is not None and str(cause) not in str(error):
        return f"a file cannot be written: {reason(cause)}"
    if isinstance(error, (ValueError, OSError)):
        line = " ".join(str(error).split())
        return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE // 2]} .. {line[-MAX_LINE // 2 :]}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"there is not enough memory: {reason(error)}"
    if isinstance(error, ImportError):
        return f"a package is missing: {' '.join(str(error).split())}"
    frames = traceback.extract_tb(error.__traceback__)
    places = [frame for frame in frames if Path(frame.filename).is_relative_to(Path(__file__).parent)] or frames
    place = f"{Path(places[-1].filename).name}, line {places[-1].lineno}" if places else "nowhere"
    said = " ".join(reason(error).split()).removeprefix(f"{type(error).__name__}: ")
    return f"unexpected {type(error).__name__}: {said} ({place}; --debug shows the traceback)"


def _pop_debug(argv: list[str]) -> bool:
    """Takes `--debug`, `--debug true` or `--debug false` out of the command line; with the name of a check it is a flag
    of transformers."""
    for index, word in enumerate(argv):
        following = "".join(argv[index + 1 : index + 2]).lower()
        if word == "--debug" and following not in ("underflow_overflow", "tpu_metrics_debug"):
            del argv[index : index + 1 + (following in ("true", "false"))]
            return following != "false"
    return False


@command
def main() -> None:
    """The program `hf-relpos`: runs the sub-command that the command line begins with."""
    sys.argv[0], words = PROGRAM, sys.argv[1:]
    if not sys.stderr.isatty():  # the bars of other libraries: a file keeps every copy of them
        os.environ.setdefault("TQDM_MININTERVAL", "30")
    if words[:1] in (["--help"], ["-h"]):
        print(_usage())
        return
    if words == ["--version"]:
        print(f"{PROGRAM} {sys.modules[__package__].__version__}")
        return
    if not words:
        raise ValueError(f"a sub-command is needed, one of {', '.join(COMMANDS)}; --help says what they do.")
    name, *flags = words
    if name not in COMMANDS:
        raise ValueError(f"unknown sub-command: {name!r}{nearest(name, COMMANDS)}; --help lists those that exist.")
    if name == "serve":  # its flags are those of `transformers serve`, which other parsers read
        import_schemes(_pop_import_files(flags))
        _check_schemes_are_imported(flags[0] if flags else None)
        sys.argv[1:] = [name, *flags]
    else:
        sys.argv = [f"{PROGRAM} {name}", *flags]
    module, _, function = COMMANDS[name][0].partition(":")
    with _without(OPTIONAL if {"--help", "-h"} & {*flags} else ()):
        getattr(import_module(module), function)()


@contextmanager
def _without(packages: Iterable[str]) -> Iterator[None]:
    """As if packages were not installed: transformers imports some that are, for which `--help` would wait."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


def _usage() -> str:
    lines = [f"  {name:<10} {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        (
            f"usage: {PROGRAM} SUB-COMMAND [flags]",
            "",
            "Causal language models for transformers whose position scheme is one config field.",
            "",
            *lines,
            "",
            f"`{PROGRAM} SUB-COMMAND --help` lists the flags, `{PROGRAM} --version` prints the version; --debug shows",
            "the traceback of an error.",
        )
    )


@command
def schemes_main() -> None:
    """Prints a line for each registered scheme: name, kind and title."""
    parse_arguments((), "Lists the position schemes: name, kind and title.")
    from .model.scheme_base import POSITION_EMBEDDINGS

    width = max(map(len, POSITION_EMBEDDINGS))
    for name, scheme in POSITION_EMBEDDINGS.items():
        title = (scheme.__doc__ or scheme.__name__).strip().partition("\n\n")[0]
        print(f"{name:<{width}}  {scheme.kind:<8}  {' '.join(title.split())}")
    from .scheme_files import imported_schemes

    name = (imported_schemes() or ["alibi"])[0]
    say_train_next(name)


def parse_arguments(
    types: Sequence[type],
    description: str,
    argv: Sequence[str] | None = None,
    positional: str | None = None,
    usual: Sequence[str] = (),
    required: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Command line → one instance of each dataclass, and after them the list of `positional`, if it is given.

    `--config FILE` reads flags from a YAML file first (`learning_rate: 1e-3`, lists and dictionaries as YAML has them);
    flags on the command line win. `--import_file FILE`, in either, registers the schemes of a Python file before the
    flags are read. `positional` names words that need no flag and of which at least one is required. `--help` shows the
    flags `usual` first, by default all of the dataclasses in their order, and `required` in the usage.

    Raises:
        ValueError: for an unknown flag, a value of the wrong type, a file that is missing or no YAML dictionary, a
            file of schemes that cannot be imported, or a model whose scheme lies in a file that was not given.
    """
    parser = make_parser(types, description, usual, required)
    parser.add_argument("--config", metavar="FILE", help="A YAML file of flags; those on the command line win.")
    parser.add_argument(f"--{IMPORT_FILE}", nargs="+", metavar="FILE", help=IMPORT_HELP)
    if positional:
        parser.add_argument("words", nargs="+", metavar=positional)
    argv = list(sys.argv[1:] if argv is None else argv)
    known, files = {action.dest for action in parser._actions if action.option_strings}, _pop_import_files(argv)
    path = _pop_config(argv)
    if path is not None:
        values = _read_config(path, known)
        files = [*as_list(values.pop(IMPORT_FILE, None)), *files]
    import_schemes(files)
    try:
        argv = (_words(values, parser) if path is not None else []) + argv
        *parsed, others = parser.parse_args_into_dataclasses(argv)
        _check_numbers(parsed)
    except ValueError as error:
        raise ValueError(_with_file(str(error), path, values if path is not None else {})) from error
    words = others.words if positional else []
    for folder in (*(getattr(each, "model_name_or_path", None) for each in parsed), *words):
        _check_schemes_are_imported(folder)
    return (*parsed, words) if positional else tuple(parsed)


def parse_values(types: Sequence[type], values: dict[str, Any]) -> tuple[Any, ...]:
    """Flags as a YAML file has them → one instance of each dataclass; raises `ValueError` as `parse_arguments` does."""
    parser, unknown = _parser(tuple(types)), set(values)
    for action in parser._actions:
        unknown.discard(action.dest)
    if unknown:
        flag = sorted(unknown)[0]
        raise ValueError(f"unknown flag: {flag!r}{flag_hint(flag, [action.dest for action in parser._actions])}.")
    parsed = parser.parse_args_into_dataclasses(_words(values, parser))
    _check_numbers(parsed)
    return parsed


@functools.cache
def _parser(types: tuple[type, ...]) -> Any:
    """A sweep parses the flags of hundreds of runs."""
    return make_parser(types)


def import_schemes(files: Sequence[str]) -> None:
    """Registers the schemes of Python files; a file that was imported before is not imported again.

    Raises:
        ValueError: if a file is missing, fails, or registers no scheme or one of an existing name.
    """
    if files:
        from .scheme_files import import_scheme_file

        for path in files:
            import_scheme_file(path)


def say_next(name: str, *words: object, **flags: object) -> None:
    """The last line of a program: a whole command that goes on from what it has made; arguments as
    `command_words`."""
    say_command(command_words(name, *words, **flags))


def say_train_next(scheme: str) -> None:
    """`say_next` of a training that takes minutes on a CPU."""
    folder = f"output/{scheme.replace('/', '-')}"
    say_next("train", pos_embedding_type=scheme, max_steps=300, per_device_train_batch_size=8, output_dir=folder)


def command_words(name: str, *words: object, **flags: object) -> list[str]:
    """→ the words of a command, with the files of schemes that were imported here.

    Args:
        name: of the sub-command.
        words: what needs no flag.
        flags: name → value, or a list of values, of which an empty one is left out.
    """
    from .scheme_files import imported_files

    flags = {flag: as_list(value) for flag, value in (flags | {IMPORT_FILE: imported_files()}).items()}
    given = [word for flag, values in flags.items() if values for word in (f"--{flag}", *values)]
    return [*map(str, (PROGRAM, name, *words, *given))]


def as_list(value: Any) -> list[Any]:
    """A YAML value that may be a list or a single item → a list; empty for `None`."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _check_schemes_are_imported(folder: str | None) -> None:
    """Raises `ValueError` if a saved model's folder carries the file of its scheme and nobody imported it."""
    if folder and (Path(folder) / "config.json").is_file():
        from .scheme_files import check_schemes_are_imported

        check_schemes_are_imported(Path(folder))


def _check_numbers(parsed: Iterable[Any]) -> None:
    """Raises `ValueError` for a number that no computation could take."""
    for instance in parsed:
        for name, value in ((name, each) for name, values in vars(instance).items() for each in as_list(values)):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"`{name}` must be a finite number, got {value}.")
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ValueError(f"`{name}` must be below 2^63, got a number of {len(str(value))} digits.")


def _with_file(message: str, path: str | None, values: Iterable[str]) -> str:
    """An error of a flag, with the file of flags before it if the flag stands there."""
    named = re.match(r"argument --(\w+)|`(\w+)`", message)
    return f"--config {path!r}: {message}" if named and (named[1] or named[2]) in values else message


def _pop_import_files(argv: list[str]) -> list[str]:
    """Takes each `--import_file FILE ..` and `--import_file=FILE` out of the command line; → the files."""
    found, kept, takes = [], [], False
    for word in argv:
        flag, equals, path = word.partition("=")
        if flag in IMPORT_FLAGS:
            found += [path] if equals else []
            takes = not equals
        elif takes and word.endswith(".py"):
            found.append(word)
        else:
            takes = False
            kept.append(word)
    if not all(found) or ({*IMPORT_FLAGS} & {*argv} and not found):
        raise ValueError(f"--{IMPORT_FILE} takes Python files, NAME.py.")
    argv[:] = kept
    return found


def _pop_config(argv: list[str]) -> str | None:
    """Takes `--config FILE` or `--config=FILE` out of the command line."""
    found = [index for index, word in enumerate(argv) if word.partition("=")[0] == "--config"]
    if not found:
        return None
    _, equals, path = argv.pop(found[0]).partition("=")
    if len(found) > 1 or not (equals or argv[found[0] :]):
        raise ValueError("--config takes one file, once.")
    return path if equals else argv.pop(found[0])


def _read_config(path: str, known: set[str]) -> dict[str, Any]:
    values = read_yaml(path, "--config")
    if not isinstance(values, dict):
        raise ValueError(f"--config {path!r} must hold a dictionary of flags.")
    if "config" in values:
        raise ValueError(f"--config {path!r} holds `config`: a file of flags names no further one.")
    for name in values:
        if name not in known:
            hint = flag_hint(str(name), sorted(known))
            raise ValueError(f"--config {path!r} holds an unknown flag: {name!r}{hint}.")
    return values


def _words(values: dict[str, Any], parser: Any) -> list[str]:
    """→ the command line that says the same; raises `ValueError` for a list where one value is wanted."""
    several = {action.dest for action in parser._actions if action.nargs in ("+", "*")}
    flags = []
    for name, value in values.items():
        if name == "report_to" and isinstance(value, list) and len(value) == 1:  # as TrainingArguments takes it
            value = value[0]
        if isinstance(value, list) and name not in several:
            raise ValueError(f"`{name}` takes one value, got {value!r}.")
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags
