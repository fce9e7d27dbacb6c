"""What makes a saved folder load anywhere: it carries the code of the family and says which class is where.

transformers finds that code by the class of the saved object, which is another one under FSDP2, and notes that class
alone. Here the files and the names are constants. The file of a scheme that is defined elsewhere goes along: its
imports of the package become relative, and the folder's copy of `scheme_registry.py` imports it.
"""

import ast
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from .configuration_relpos import RelPosConfig
from .scheme_base import POSITION_EMBEDDINGS
from .scheme_registry import position_embedding_classes


logger = logging.get_logger(__name__)

PACKAGE, REGISTRY = "hf_relpos", "scheme_registry.py"
# Auto class → the file and class that it stands for
AUTO_MAP = {
    "AutoConfig": "configuration_relpos.RelPosConfig",
    "AutoModel": "modeling_relpos.RelPosModel",
    "AutoModelForCausalLM": "modeling_relpos.RelPosForCausalLM",
    "AutoModelForSequenceClassification": "modeling_relpos.RelPosForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_relpos.RelPosForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_relpos.RelPosForQuestionAnswering",
}

# Pipelines and the Trainer's label smoothing look a class up by name in these tables: a name that is missing there is
# trained on labels that are not shifted
for _auto_class, _names in {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}.items():
    _names[RelPosConfig.model_type] = AUTO_MAP[_auto_class].rpartition(".")[2]


# what to do about a file that cannot be carried
OWN_FILE, ONE_FILE = "; put the class into a file of its own", "; put both into one file"


class NotCarried(ValueError):
    """Why the file of a scheme cannot go into a saved folder."""


def code_files() -> list[Path]:
    """The files that a folder needs to load without the package: that of the models and all that it imports."""
    models = Path(__file__).parent / "modeling_relpos.py"
    return [models, *sorted(Path(file) for file in get_relative_import_files(models))]


def saved_code(pos_embedding_type: str) -> dict[str, bytes]:
    """→ name → content of all code that a saved folder holds, the files of schemes defined elsewhere among it."""
    files = {file.name: file.read_bytes() for file in code_files()}
    carried = {name: cls for name, cls in _foreign_classes(pos_embedding_type).items() if not _obstacle(cls)}
    sources = {_source(cls) for cls in carried.values()}
    for source in sorted(sources):
        files[source.name] = _portable(source).encode()
        names = sorted(cls.__name__ for cls in carried.values() if _source(cls) == source)
        line = f"from .{source.stem} import {', '.join(names)}  # noqa: F401"
        files[REGISTRY] = _with_import(files[REGISTRY].decode(), line).encode()
    return files


def carried_names(pos_embedding_type: str) -> list[str]:
    """→ the names of the files in a saved folder that define schemes which the family does not have."""
    return sorted(saved_code(pos_embedding_type).keys() - {file.name for file in code_files()})


def foreign_schemes(pos_embedding_type: str) -> dict[str, tuple[str, str]]:
    """Name → module and reason, for the schemes whose code a saved folder cannot carry."""
    classes = _foreign_classes(pos_embedding_type)
    return {name: (cls.__module__, reason) for name, cls in classes.items() if (reason := _obstacle(cls))}


def carried_files(folder: str | os.PathLike) -> list[Path]:
    """The files of a saved folder that define schemes which the family does not have."""
    registry = Path(folder) / REGISTRY
    files = map(Path, get_relative_import_files(registry)) if registry.is_file() else ()
    return sorted(file for file in files if file.is_file() and file.stem not in reserved_names())


def reserved_names() -> set[str]:
    """The names that a file beside those of the family must not have, without suffix."""
    return {file.stem for file in code_files()} | {"__init__", "__main__", *sys.stdlib_module_names}


def imports_relatively(file: Path) -> bool:
    """Whether a file imports the family's files relatively, as one out of a saved folder does."""
    return re.search(r"^from\s+\.\w+\s+import", file.read_text(encoding="utf-8"), flags=re.MULTILINE) is not None


def twin_of(file: Path) -> ModuleType | None:
    """→ the module that is imported already from the file which a file of a saved folder is the portable copy of."""
    text = file.read_text(encoding="utf-8")
    for cls in POSITION_EMBEDDINGS.values():
        source = _source(cls)
        if source is not None and source.stem == file.stem and not _obstacle(cls) and _portable(source) == text:
            return sys.modules[cls.__module__]
    return None


def _foreign_classes(pos_embedding_type: str) -> dict[str, type]:
    here = Path(__file__).parent
    classes = position_embedding_classes(pos_embedding_type)
    return {name: cls for name, cls in classes.items() if (source := _source(cls)) is None or source.parent != here}


def _source(cls: type) -> Path | None:
    """The file that defines a class; `None` in a notebook."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return Path(file).resolve() if file and Path(file).is_file() else None


def _obstacle(cls: type) -> str | None:
    """Why the file of a class cannot be carried; `None` if it can."""
    source = _source(cls)
    if source is None or source.suffix != ".py":
        return f"no Python file holds it{OWN_FILE}"
    if "." in cls.__qualname__:
        return f"its class {cls.__qualname__!r} is not at the top level of a file{OWN_FILE}"
    if not source.stem.isidentifier() or source.stem in reserved_names():
        return f"its file must be renamed, {source.name!r} cannot lie beside the family's files"
    try:
        _portable(source)
    except (NotCarried, SyntaxError) as error:
        advice = "" if str(error).endswith(ONE_FILE) else OWN_FILE
        return f"its file {source.name!r} cannot be carried, as {error}{advice}"
    return None


# --- a file of the user's, as a saved folder holds it


def _portable(source: Path) -> str:
    """→ the text of a file with relative imports of the family's files and without what runs as a script.

    Raises:
        NotCarried: if it imports what a saved folder does not hold.
    """
    text = source.read_text(encoding="utf-8")
    tree = ast.parse(text)
    scripts = [node for node in tree.body if _is_main_guard(node)]
    skipped = {id(node) for script in scripts for node in ast.walk(script)}
    nodes = [node for node in ast.walk(tree) if id(node) not in skipped]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    top = {id(node) for node in tree.body}
    edits = [(script, "") for script in scripts]
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            replacement = _relative(node, used, id(node) in top)
            edits += [] if replacement is None else [(node, replacement)]
    lines = text.splitlines(keepends=True)
    for node, replacement in sorted(edits, key=lambda edit: (edit[0].lineno, edit[0].col_offset), reverse=True):
        _replace(lines, node, replacement)
    return "".join(lines).rstrip() + "\n"


def _is_main_guard(node: ast.stmt) -> bool:
    if not isinstance(node, ast.If) or node.orelse:
        return False
    return ast.unparse(node.test) in ("__name__ == '__main__'", "'__main__' == __name__")


def _replace(lines: list[str], node: ast.stmt, text: str) -> None:
    """Puts a text in the place of a statement, whose columns count bytes."""
    first, last = lines[node.lineno - 1].encode(), lines[node.end_lineno - 1].encode()
    before, after = first[: node.col_offset].decode(), last[node.end_col_offset :].decode()
    indented = text.replace("\n", f"\n{before}")
    whole = (before + indented + after) if text else (before + after.lstrip(" \t;"))
    lines[node.lineno - 1 : node.end_lineno] = [whole if whole.strip() else ""]


def _relative(node: ast.Import | ast.ImportFrom, used: set[str], at_top: bool) -> str | None:
    """→ what an import becomes in a saved folder; `None`: it stays."""
    if isinstance(node, ast.Import):
        names = [alias.name.partition(".")[0] for alias in node.names]
        if PACKAGE in names:
            raise NotCarried(f"`import {PACKAGE}` in line {node.lineno} must be `from {PACKAGE} import …`")
        for name in names:
            _check_installed(name)
        return None
    if node.level == 0 and (node.module or "").partition(".")[0] != PACKAGE:
        _check_installed(node.module.partition(".")[0])
        return None
    if node.level:
        if node.level > 1 or node.module not in reserved_names():
            raise NotCarried(f"it imports another local file in line {node.lineno}{ONE_FILE}")
        return None
    by_module: dict[str, list[ast.alias]] = {}
    for alias in node.names:
        if alias.name == "*":
            raise NotCarried(f"`import *` in line {node.lineno} must name what it imports")
        if (alias.asname or alias.name) in used:
            by_module.setdefault(_home(node.module, alias.name), []).append(alias)
    for module in by_module:
        file = Path(__file__).parent / f"{module}.py"
        if not file.is_file() or module not in reserved_names():
            raise NotCarried(f"line {node.lineno} imports from {PACKAGE} what a saved folder does not hold")
        if at_top and any(Path(each).name == REGISTRY for each in (file, *get_relative_import_files(file))):
            raise NotCarried(
                f"line {node.lineno} imports {module!r}, which imports the schemes: import it where it is used"
            )
    imports = [f"from .{module} import {', '.join(map(ast.unparse, names))}" for module, names in by_module.items()]
    return "\n".join(imports) if imports or at_top else "pass"


def _home(module: str, name: str) -> str:
    """→ the file of the family, without suffix, that a name is imported from; "" if there is none."""
    inside = f"{PACKAGE}.model."
    if module == PACKAGE:
        module = getattr(getattr(sys.modules.get(PACKAGE), name, None), "__module__", None) or ""
    return module.removeprefix(inside) if module.startswith(inside) else ""


def _check_installed(name: str) -> None:
    """Raises `NotCarried` for a module that lies with the user's own files."""
    if name in sys.stdlib_module_names:
        return
    try:
        spec = getattr(sys.modules.get(name), "__spec__", None) or importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:  # an optional library
        return
    places = [*(spec.submodule_search_locations or ()), spec.origin or ""]
    if not any({"site-packages", "dist-packages"} & {*Path(place).parts} for place in places):
        raise NotCarried(f"it imports another local file, {name!r}{ONE_FILE}")


def _with_import(registry: str, line: str) -> str:
    """→ the text of `scheme_registry.py` with one more import after those of the families."""
    lines = registry.splitlines()
    if line not in lines:
        families = [node for node in ast.parse(registry).body if isinstance(node, ast.ImportFrom) and node.level == 1]
        lines.insert(families[-1].end_lineno, line)
    return "\n".join(lines) + "\n"


class SelfContainedModel:
    """Mixin for a `PreTrainedModel`: every way to save or push it takes the code along."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing to do: `save_pretrained` writes the code and the names of all Auto classes."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers; the folder also gets the code of the family, so that it loads without the package."""
        folder, adapter_only = Path(save_directory), getattr(self, "_hf_peft_config_loaded", False)
        if is_main_process and not adapter_only and not folder.is_file():
            self.config.auto_map = dict(AUTO_MAP)
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in saved_code(self.config.pos_embedding_type).items():
                part = folder / f"{name}.{os.getpid()}.part"
                part.write_bytes(content)
                os.replace(part, folder / name)
            self._warn_of_foreign_schemes(folder)
        self.config._auto_class = None  # else the configuration would write its code again, without such files
        try:
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        finally:
            del self.config._auto_class

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """As in transformers, with its arguments; where the package `hf_relpos` is imported, the repository also gets
        the card and what the folder that the model was loaded from tells of it."""
        package = sys.modules.get("hf_relpos")
        if package is None:
            return super().push_to_hub(repo_id, **kwargs)
        return package.push_model(self, repo_id, **kwargs)

    def _warn_of_foreign_schemes(self, folder: Path) -> None:
        for name, (module, reason) in foreign_schemes(self.config.pos_embedding_type).items():
            logger.warning(
                f"The position embedding {name!r} is defined in {module!r}, which is not saved to {str(folder)!r}, "
                f"since {reason}. As it is, it must be imported before the model is loaded."
            )
