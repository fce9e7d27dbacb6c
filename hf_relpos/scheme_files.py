"""Position schemes in files of the user's: `--import_file my_scheme.py` registers what such a file defines."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .file_reading import read_json
from .model.saved_code import carried_files, imports_relatively, reserved_names, twin_of
from .model.scheme_base import POSITION_EMBEDDINGS


# file → the module that it became
_IMPORTED: dict[Path, ModuleType] = {}


def imported_files(pos_embedding_type: str | None = None) -> list[Path]:
    """The files that were imported here, in order; only those that define schemes of `pos_embedding_type`, if given."""
    names = set(POSITION_EMBEDDINGS if pos_embedding_type is None else _names(pos_embedding_type))
    modules = {scheme.__module__ for name, scheme in POSITION_EMBEDDINGS.items() if name in names}
    return [file for file, module in _IMPORTED.items() if module.__name__ in modules]


def imported_schemes(pos_embedding_type: str | None = None) -> list[str]:
    """The names of the schemes that imported files define, in order; only those in `pos_embedding_type`, if given."""
    modules = {module.__name__ for module in _IMPORTED.values()}
    names = POSITION_EMBEDDINGS if pos_embedding_type is None else dict.fromkeys(_names(pos_embedding_type))
    return [name for name in names if POSITION_EMBEDDINGS[name].__module__ in modules]


def import_flags(pos_embedding_type: str | None) -> dict[str, list[str]]:
    """→ the flag that imports the files of a model's schemes, as records hold flags; empty if there are none."""
    files = imported_files(str(pos_embedding_type))
    return {"import_file": [file.name for file in files]} if files else {}


def _names(pos_embedding_type: str) -> list[str]:
    return pos_embedding_type.replace("/", "+").split("+")


def import_scheme_file(path: str | Path) -> ModuleType:
    """Executes a Python file as a module under its stem; a file that was imported before is not executed again.

    A file out of a saved folder imports the family's files relatively; it becomes a module of `hf_relpos.model`. Where
    the file that it was made from is imported already, unchanged since, that one's module is returned.

    Args:
        path: of a file with at least one `register_position_embedding`.

    Raises:
        ValueError: if it is missing, has the name of another module, fails, or registers no scheme or one of an
            existing name.
    """
    file = Path(path).resolve()
    if file.suffix != ".py":
        raise ValueError(f"`import_file` must name a Python file, `NAME.py`, got {str(path)!r}.")
    if not file.is_file():
        raise ValueError(f"`import_file` {str(path)!r} does not exist.")
    if not file.stem.isidentifier() or file.stem in reserved_names():
        raise ValueError(f"`import_file` {str(path)!r} has a name that cannot be imported or is in use: rename it.")
    try:
        name = f"{__package__}.model.{file.stem}" if imports_relatively(file) else file.stem
    except UnicodeDecodeError as error:
        raise ValueError(f"`import_file` {str(path)!r} is not UTF-8 text (near byte {error.start}).") from error
    if (module := sys.modules.get(name)) is not None:
        if Path(getattr(module, "__file__", None) or "/").resolve() != file:
            raise ValueError(f"`import_file` {str(path)!r} has the name of another module, {name!r}: rename it.")
    _IMPORTED[file] = module or twin_of(file) or _execute(path, name, file)
    return _IMPORTED[file]


def _execute(path: str | Path, name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    module, before = importlib.util.module_from_spec(spec), dict(POSITION_EMBEDDINGS)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        if before == POSITION_EMBEDDINGS:
            raise ValueError("it registers no position embedding")
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        POSITION_EMBEDDINGS.clear()
        POSITION_EMBEDDINGS.update(before)
        reason = _file_beside(error, file) or (
            str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        )
        raise ValueError(f"`import_file` {str(path)!r} cannot be imported: {reason}") from error
    return module


def _file_beside(error: BaseException, file: Path) -> str | None:
    """→ what to do if a file imports another one beside it, which no saved folder would carry."""
    name = (getattr(error, "name", None) or "").removeprefix(f"{__package__}.model.").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and name and name != file.stem:
        beside = [path for path in (file.with_name(f"{name}.py"), file.with_name(name)) if path.exists()]
        if beside:
            return (
                f"it imports {name!r}, which lies beside it and would not be saved with models: put both into one file"
            )
    return None


def check_schemes_are_imported(folder: Path) -> None:
    """Raises `ValueError` if a saved model has a scheme that is not registered and whose file its folder carries."""
    try:
        chosen = read_json(folder / "config.json").get("pos_embedding_type")
    except ValueError:  # whoever loads the model says what is wrong with it
        return
    missing = [name for name in _names(str(chosen)) if name not in POSITION_EMBEDDINGS]
    if missing and (files := carried_files(folder)):
        flags = " ".join(f"--import_file {file}" for file in files)
        raise ValueError(f"{str(folder)!r} has the position embedding {missing[0]!r} of its own code: give {flags}")
