"""What to install where an optional package is missing."""

from importlib.util import find_spec

from .compat import is_upstream


def need(module: str, extra: str) -> None:
    """Make sure that a package is there; recipes call it before anything is built.

    Args:
        module: Name by which the package is imported.
        extra: Extra of this package that brings it, beside the maintained fork of OpenMMLab;
            beside upstream it has a name of its own.

    Raises:
        ModuleNotFoundError: If it is not installed; the message has the command that does it.
    """
    if find_spec(module) is None:
        extra = f'openmmlab-{extra}' if is_upstream() else extra
        raise ModuleNotFoundError(
            f"the package {module}, which is not installed; pip install 'greenmim-mm[{extra}]'",
            name=module,
        )
