"""Where the recipes lie: in an installed package as in a clone."""

from pathlib import Path

from .errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


def recipe_folder() -> Path:
    """``.mim/configs`` of an installed wheel, or ``configs`` of a clone.

    Raises:
        UserError: If there is neither.
    """
    # A clone that was built holds both; its own files are the newer ones.
    for folder in (_PACKAGE.parent / 'configs', _PACKAGE / '.mim' / 'configs'):
        if (folder / 'greenmim').is_dir():
            return folder
    raise UserError(
        f'the recipes of greenmim_mm are missing: neither {_PACKAGE.parent / "configs"} nor '
        f'{_PACKAGE / ".mim" / "configs"} holds them; install the package anew'
    )


def is_clone() -> bool:
    """Whether the package is that of a clone, with recipes and tools beside it."""
    return recipe_folder() == _PACKAGE.parent / 'configs'


def find_recipe(name: str) -> Path:
    """Path of a recipe by its name below the folder of all.

    Raises:
        UserError: If it is not there.
    """
    path = recipe_folder() / name
    if not path.is_file():
        raise UserError(
            f'recipe {name} does not lie in {recipe_folder()}; install the package anew'
        )
    return path
