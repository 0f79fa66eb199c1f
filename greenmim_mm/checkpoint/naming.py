"""Tables of names, read in either direction.

A :class:`Layout` says which canonical names a kind of file has a place for, and how it spells
them. Names are templates: ``{s}`` stands for a stage, ``{d}`` for a stage that is followed by
another, ``{b}`` for a block and ``{p}`` for ``weight`` or ``bias``. ``{d+1}`` is the stage after
``{d}``, ``{2s+1}`` what torchvision makes of ``{s}``.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from .transforms import Transform

_PLACEHOLDER = re.compile(r'\{(\d?)([sdbp])(?:\+(\d))?\}')
_LIMITS = {'s': 4, 'd': 3}


class _Template:
    """A name with placeholders."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._terms = [
            (name, int(factor or 1), int(offset or 0))
            for factor, name, offset in _PLACEHOLDER.findall(text)
        ]
        pattern = re.escape(_PLACEHOLDER.sub('\0', text))
        for name, _, _ in self._terms:
            group = '(weight|bias)' if name == 'p' else '(0|[1-9][0-9]{0,3})'
            pattern = pattern.replace(re.escape('\0'), group, 1)
        self._pattern = re.compile(pattern)

    def match(self, key: str) -> dict[str, str | int] | None:
        """What the placeholders stand for in ``key``, or None if it is another name."""
        match = self._pattern.fullmatch(key)
        if match is None:
            return None
        values: dict[str, str | int] = {}
        for (name, factor, offset), text in zip(self._terms, match.groups(), strict=True):
            if name == 'p':
                values[name] = text
                continue
            value, rest = divmod(int(text) - offset, factor)
            if rest or not 0 <= value < _LIMITS.get(name, value + 1):
                return None
            values[name] = value
        return values

    def fill(self, values: Mapping[str, str | int]) -> str:
        """The name with ``values`` for its placeholders."""

        def replace(match: re.Match) -> str:
            factor, name, offset = match.groups()
            value = values[name]
            return str(value if name == 'p' else int(factor or 1) * value + int(offset or 0))

        return _PLACEHOLDER.sub(replace, self._text)


@dataclass(frozen=True, eq=False)
class Layout:
    """Names of one kind of file.

    Attributes:
        version: Version of Swin, 1 or 2.
        names: Templates of the canonical names that have a place.
        spelling: Pairs (piece of a canonical name, its spelling here); the first that fits.
        prefix: What stands before all names but those of ``head.`` and ``neck.``.
        transforms: In what the values differ from the canonical ones.
        model_has: Canonical names beyond blocks and embedding that the library's model has.
        whole_models: Whether a file may hold a whole model, of which the names with the prefix
            are the backbone.
    """

    version: int
    names: tuple[str, ...]
    spelling: tuple[tuple[str, str], ...] = ()
    prefix: str = ''
    transforms: tuple[Transform, ...] = ()
    model_has: tuple[str, ...] = ()
    whole_models: bool = False

    @cached_property
    def _pairs(self) -> tuple[tuple[_Template, _Template], ...]:
        return tuple((_Template(name), _Template(self._spell(name))) for name in self.names)

    def _spell(self, name: str) -> str:
        prefix = '' if name.startswith(('head.', 'neck.')) else self.prefix
        spelling: dict[str, str] = {}
        for piece, here in self.spelling:
            spelling.setdefault(piece, here)
        if spelling:
            pieces = re.compile('|'.join(re.escape(piece) for piece in spelling))
            name = pieces.sub(lambda match: spelling[match[0]], name)
        return prefix + name

    def to_canonical(self, key: str) -> str | None:
        """Canonical name of a key, or None if the layout does not know it."""
        return _translate(key, self._pairs)

    def from_canonical(self, key: str) -> str | None:
        """Name of a canonical key here, or None if there is no place for it."""
        return _translate(key, ((other, own) for own, other in self._pairs))

    def is_beside(self, key: str) -> bool:
        """Whether a key that the layout does not know belongs to another part of the model."""
        return self.whole_models and bool(self.prefix) and not key.startswith(self.prefix)


def _translate(key: str, pairs: Iterable[tuple[_Template, _Template]]) -> str | None:
    for target, source in pairs:
        if (values := source.match(key)) is not None:
            return target.fill(values)
    return None


@dataclass(frozen=True, eq=False)
class Format:
    """Naming of one family of checkpoints.

    Attributes:
        name: Name of the format.
        description: Whose files these are.
        layouts: Its kinds of files; the first of a version is preferred.
        licence: Licence note that the files carry along, or None.
        wrapper: Key under which a file keeps its parameters; None if it is their dict itself.
        ignored: Patterns of keys that hold nothing learned and can be computed.
        refused: ``{version: why the format has none}``.
    """

    name: str
    description: str
    layouts: tuple[Layout, ...]
    licence: str | None = None
    wrapper: str | None = 'state_dict'
    ignored: tuple[str, ...] = ()
    refused: Mapping[int, str] = field(default_factory=dict)

    @property
    def versions(self) -> tuple[int, ...]:
        """Versions of Swin that the format can hold."""
        return tuple(sorted({layout.version for layout in self.layouts}))

    def to_canonical(self, key: str) -> str | None:
        """Canonical name of a key in the first layout that knows it, or None."""
        names = (layout.to_canonical(key) for layout in self.layouts)
        return next((name for name in names if name is not None), None)

    def ignores(self, key: str) -> bool:
        """Whether a key holds nothing learned."""
        return any(re.fullmatch(pattern, key) for pattern in self.ignored)

    def source_layout(self, keys: Collection[str]) -> Layout:
        """The layout that knows most of a file's keys."""
        return max(self.layouts, key=lambda layout: count_known(layout.to_canonical, keys))

    def target_layout(self, canonical: Collection[str], version: int) -> Layout:
        """The layout with a place for most of the canonical keys.

        Raises:
            ValueError: If the format has no such version of Swin.
        """
        layouts = [layout for layout in self.layouts if layout.version == version]
        if not layouts:
            reason = self.refused.get(version, 'it has no names for it')
            raise ValueError(f'Swin V{version} cannot become {self.name}: {reason}')
        return max(layouts, key=lambda layout: count_known(layout.from_canonical, canonical))


def count_known(translate: Callable[[str], str | None], keys: Iterable[str]) -> int:
    """How many of the keys have a translation."""
    return sum(translate(key) is not None for key in keys)
