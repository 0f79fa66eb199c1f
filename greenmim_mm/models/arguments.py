"""What a network is told, checked: configs are written by hand and by command lines."""

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any


def _is_integer(value: Any) -> bool:
    # To Python a bool is one.
    return isinstance(value, Integral) and not isinstance(value, bool)


_KINDS: dict[str, Callable[[Any], bool]] = {
    'an integer': _is_integer,
    'a number': lambda value: isinstance(value, Real) and not isinstance(value, bool),
    'True or False': lambda value: isinstance(value, bool),
    'a list of integers': lambda value: (
        isinstance(value, Sequence) and all(_is_integer(item) for item in value)
    ),
}


def check_types(kind: str, **arguments: Any) -> None:
    """Raise ``TypeError`` with the name of the first argument that is not of a kind.

    Configs are written by hand and by command lines: a number in quotes is soon there.

    Args:
        kind: 'an integer', 'a number', 'True or False' or 'a list of integers'.
        arguments: Values by name.
    """
    for name, value in arguments.items():
        if not _KINDS[kind](value):
            raise TypeError(f'{name}={value!r} must be {kind}')


def find_arch(arch: str | dict, archs: dict[str, dict], optional: dict[str, Any]) -> dict:
    """The settings of an architecture by name, or the dict itself if it has the right keys.

    Raises:
        TypeError: If a setting is of a wrong type.
        ValueError: If the name is unknown, keys are missing or too many, or numbers make no sense.
    """
    if isinstance(arch, str):
        if arch.lower() not in archs:
            raise ValueError(f'arch={arch!r} is unknown; use one of {list(archs)} or a dict')
        return archs[arch.lower()]
    keys = tuple(next(iter(archs.values())))
    if not isinstance(arch, dict) or set(optional | arch) != set(keys):
        raise ValueError(f'arch={arch!r} must be one of {list(archs)} or a dict with keys {keys}')
    embed_dims, depths, num_heads = (arch[key] for key in ('embed_dims', 'depths', 'num_heads'))
    check_types('an integer', **{'arch.embed_dims': embed_dims})
    check_types('a list of integers', **{'arch.depths': depths, 'arch.num_heads': num_heads})
    if not len(depths) == len(num_heads) == 4 or min(*depths, *num_heads, embed_dims) < 1:
        raise ValueError(
            f'arch={arch!r}: depths and num_heads need four positive integers each, embed_dims one'
        )
    for stage, heads in enumerate(num_heads):
        if (embed_dims << stage) % heads:
            raise ValueError(
                f'arch={arch!r}: the {embed_dims << stage} channels of stage {stage} cannot be '
                f'split into {heads} heads'
            )
    for key in optional:
        if not isinstance(arch.get(key, 0), int) or arch.get(key, 0) < 0:
            raise ValueError(f'arch has {key}={arch[key]}; it must be an integer, 0 for none')
    return optional | arch


def window_sides(window_size: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Side of the windows of each stage, in tokens.

    Raises:
        ValueError: If the argument is none, or not one for each stage.
    """
    single = not isinstance(window_size, Sequence)
    sizes = (window_size,) * num_stages if single else tuple(window_size)
    if len(sizes) != num_stages or any(not isinstance(s, int) or s < 1 for s in sizes):
        raise ValueError(
            f'window_size={window_size} must be a positive integer or {num_stages} of them, one '
            'per stage'
        )
    return sizes


def image_sides(img_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width in pixels.

    Raises:
        ValueError: If the argument is neither one side nor two.
    """
    single = not isinstance(img_size, Sequence)
    size = (img_size, img_size) if single else tuple(img_size)
    if len(size) != 2 or any(not isinstance(s, int) or s < 1 for s in size):
        raise ValueError(f'img_size={img_size} must be a positive integer or (height, width)')
    return size
