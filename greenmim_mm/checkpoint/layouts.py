"""In what formats differ: the names of a kind of file, and what is done to some of its values.

A :class:`Layout` says which canonical names a kind of file has a place for, and how it spells
them. Names are templates: ``{s}`` stands for a stage, ``{d}`` for a stage that is followed by
another, ``{b}`` for a block and ``{p}`` for ``weight`` or ``bias``. ``{d+1}`` is the stage after
``{d}``, ``{2s+1}`` what torchvision makes of ``{s}``.

A :class:`Transform` makes canonical values of a format's, and back:

- **Channel order of patch merging.** A cell of 2x2 tokens with ``C`` channels is one vector of
  ``4 * C``. OpenMMLab takes it from ``nn.Unfold``: channel first, inside it the place, row by
  row. All others take the place first, column by column. In Swin V1 it concerns the norm before
  the reduction, too; in V2 the norm comes after it.
- **Query, key and value** are one layer, or three (transformers).
- **Index buffers** are square, or flat (torchvision).
- **Biases of queries and values** are two vectors in Swin V2, whose keys have none; torchvision
  has one joint bias, of which it does not use the keys' part.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

TABLE = 'relative_position_bias_table'
INDEX = 'relative_position_index'
COORDS = 'relative_coords_table'
# What follows from the windows, under these names in every format.
BUFFERS = (INDEX, COORDS, 'attn_mask')

_PLACEHOLDER = re.compile(r'\{(\d?)([sdbp])(?:\+(\d))?\}')
_LIMITS = {'s': 4, 'd': 3}


@dataclass(frozen=True)
class Entry:
    """A value on its way from one format to another.

    Attributes:
        value: The value.
        sources: Keys of the source that it is made of, each with the value there.
        how: What was done to it.
        read_by: The transform that made the value of ``sources``; None if none did, or if the
            value was changed since.
    """

    value: Tensor
    sources: Mapping[str, Tensor]
    how: tuple[str, ...] = ()
    read_by: 'Transform | None' = None

    def changed(self, value: Tensor, how: str) -> 'Entry':
        """The entry with another value."""
        return replace(self, value=value, how=(*self.how, how), read_by=None)


@dataclass(frozen=True, eq=False)
class Transform:
    """How some parameters of a format are made of canonical ones, and back.

    Attributes:
        foreign: Ends of the names in the format.
        canonical: Ends of the canonical names.
        read: Values under ``foreign`` to values under ``canonical``.
        write: The way back.
        read_how: What reading does, for reports.
        write_how: What writing does.
    """

    foreign: tuple[str, ...]
    canonical: tuple[str, ...]
    read: Callable[..., tuple[Tensor, ...]]
    write: Callable[..., tuple[Tensor, ...]]
    read_how: str
    write_how: str

    def reading(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Entries under the format's names to entries under canonical ones."""

        def read(*parts: Entry) -> Iterator[Entry]:
            sources = {key: value for part in parts for key, value in part.sources.items()}
            for value in self.read(*(part.value for part in parts)):
                yield Entry(value, sources, (self.read_how,), self)

        return _regrouped(entries, self.foreign, self.canonical, read)

    def writing(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """The way back; what this transform has read becomes what it was."""

        def write(*parts: Entry) -> Iterator[Entry]:
            if all(part.read_by is self for part in parts):
                for key, value in parts[0].sources.items():
                    yield Entry(value, {key: value})
                return
            sources = {key: value for part in parts for key, value in part.sources.items()}
            steps = dict.fromkeys(step for part in parts for step in part.how)
            for value in self.write(*(part.value for part in parts)):
                yield Entry(value, sources, (*steps, self.write_how))

        return _regrouped(entries, self.canonical, self.foreign, write)


def _regrouped(
    entries: Mapping[str, Entry],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    function: Callable[..., Iterator[Entry]],
) -> dict[str, Entry]:
    """Entries in which each whole group with the ends ``inputs`` has become one of ``outputs``."""
    result: dict[str, Entry] = {}
    for name, entry in entries.items():
        end = next((end for end in inputs if name.endswith(end)), None)
        stem = name.removesuffix(end or '')
        group = [entries.get(stem + end) for end in inputs]
        if end is None or None in group:
            result[name] = entry
        elif end == inputs[0]:
            for output, made in zip(outputs, function(*group), strict=True):
                result[stem + output] = made
    return result


def written_shapes(
    shapes: Mapping[str, tuple[int, ...]], transforms: Iterable[Transform]
) -> dict[str, tuple[int, ...]]:
    """The shapes that parameters of these canonical shapes have after the transforms."""
    entries = {name: Entry(torch.empty(shape, device='meta'), {}) for name, shape in shapes.items()}
    for transform in transforms:
        entries = transform.writing(entries)
    return {name: tuple(entry.value.shape) for name, entry in entries.items()}


def to_unfold_order(value: Tensor) -> Tensor:
    """Channels of patch merging, ``(..., 4 * C)``: (column, row, C) to (C, row, column)."""
    return value.unflatten(-1, (2, 2, -1)).transpose(-3, -1).flatten(-3).contiguous()


def to_column_order(value: Tensor) -> Tensor:
    """Channels of patch merging, ``(..., 4 * C)``: (C, row, column) to (column, row, C)."""
    return value.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3).contiguous()


def _columns(end: str) -> Transform:
    return Transform(
        (end,),
        (end,),
        lambda value: (to_unfold_order(value),),
        lambda value: (to_column_order(value),),
        'channel order of patch merging',
        'channel order of patch merging',
    )


COLUMNS_V2 = (_columns('.downsample.reduction.weight'),)
COLUMNS_V1 = (
    *COLUMNS_V2,
    _columns('.downsample.norm.weight'),
    _columns('.downsample.norm.bias'),
)


def _split(end: str) -> Transform:
    return Transform(
        tuple(f'.attn.w_msa.{part}.{end}' for part in 'qkv'),
        (f'.attn.w_msa.qkv.{end}',),
        lambda *parts: (torch.cat(parts),),
        # Values of their own: safetensors refuses tensors that share memory.
        lambda joint: tuple(part.clone() for part in joint.chunk(3)),
        'query, key and value joined',
        'query, key and value split',
    )


SPLIT_V2 = (_split('weight'),)
SPLIT_V1 = (*SPLIT_V2, _split('bias'))


def _without_key(joint: Tensor) -> tuple[Tensor, Tensor]:
    query, _, value = joint.chunk(3)
    return query.clone(), value.clone()


KEY_BIAS = (
    Transform(
        ('.attn.w_msa.qkv.bias',),
        ('.attn.w_msa.q_bias', '.attn.w_msa.v_bias'),
        _without_key,
        lambda query, value: (torch.cat((query, torch.zeros_like(query), value)),),
        'bias split; its part for the keys is not used',
        'bias joined, zeros for the keys',
    ),
)


def _square(index: Tensor) -> Tensor:
    side = round(index.numel() ** 0.5)
    # What is no index is left as it is; it will be made anew.
    return index.reshape(side, side) if side**2 == index.numel() else index


FLAT_INDEX = (
    Transform(
        ('.attn.w_msa.' + INDEX,),
        ('.attn.w_msa.' + INDEX,),
        lambda flat: (_square(flat),),
        lambda square: (square.flatten(),),
        'index made square',
        'index made flat',
    ),
)


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
