"""Recipes from YAML files, and the presets that have a name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pqcli.errors import RecipeError
from pqcli.recipe import documents, fairseq, strictyaml
from pqcli.recipe.recipe import Recipe
from pqcli.recipe.suggestions import close_names


def load(source: str) -> Recipe:
    """The recipe of a preset's name, or of a YAML file's path (pqcli's own vocabulary, or fairseq's).

    A preset's name wins over a file of the same name; write `./default` to mean the file. Raises `RecipeError` that
    names the file and the key.
    """
    if source in preset_names():
        return _from_yaml(configs_folder() / f"{source}.yaml", source)
    path = Path(source)
    try:
        if path.is_file():
            return _from_yaml(path, path.name)
    except OSError as error:
        raise RecipeError(f"recipe {source!r}: {error.strerror or error}") from error
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        raise RecipeError(f"recipe {source!r}: {'is a folder' if path.is_dir() else 'no such file'}")
    if source and path.is_dir():
        raise RecipeError(f"recipe {source!r}: is a folder, and no preset is called so; name a YAML file")
    raise RecipeError(
        f"no preset is called {source!r}, and no file either{close_names(source, preset_names())}; "
        f"presets: {', '.join(preset_names())}"
    )


def preset_names() -> tuple[str, ...]:
    """The presets that `load` knows by name, sorted."""
    return tuple(sorted(path.stem for path in configs_folder().glob("*.yaml")))


def configs_folder() -> Path:
    """The folder of the presets: inside the package when installed, beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _from_yaml(path: Path, name: str) -> Recipe:
    try:
        data = strictyaml.read(path)
        recipe = documents.from_json(fairseq.translate(data) if fairseq.is_fairseq(data) else data)
    except RecipeError as error:
        raise RecipeError(f"recipe {str(path)!r}: {error}") from error
    return recipe if isinstance(data, dict) and "name" in data else replace(recipe, name=name)
