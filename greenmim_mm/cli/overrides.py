"""``--cfg-options``: settings are changed, misspelt names are refused.

mmengine takes any key. A misspelt one is then ignored, or ends in a traceback far away. Here a new
key must be one that its reader knows: the runner at the top, the class that a dict with ``type``
builds, or what the runner builds from some dicts without. All other dicts are free-form.
"""

import copy
import difflib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from mmengine import registry
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import Registry
from mmengine.runner import (
    EpochBasedTrainLoop,
    FlexibleRunner,
    IterBasedTrainLoop,
    LogProcessor,
    Runner,
    TestLoop,
    ValLoop,
    set_random_seed,
)
from torch.utils.data import DataLoader

from .errors import UserError

# Taken out of a dict before its class is built.
_RESERVED = {'type', '_scope_', '_delete_', 'priority', 'convert_to_iter_based'}
# Keys of a config that the runners look up in it.
_ROOT = {
    *('runner_type', 'model_wrapper_cfg', 'find_unused_parameters', 'sync_bn', 'compile'),
    *('activation_checkpointing', 'efficient_conv_bn_eval', 'custom_imports', 'tta_model'),
    *('tta_pipeline', '_delete_'),
}
_LOADER = {'num_batch_per_epoch', 'disable_subprocess_warning'}
# Dicts at the top that need no ``type``: what is built from them, and further keys.
_BUILT: dict[str, tuple[tuple[Callable, ...], set[str]]] = {
    'train_dataloader': ((DataLoader,), _LOADER),
    'val_dataloader': ((DataLoader,), _LOADER),
    'test_dataloader': ((DataLoader,), _LOADER),
    'train_cfg': ((EpochBasedTrainLoop, IterBasedTrainLoop), {'by_epoch'}),
    'val_cfg': ((ValLoop,), set()),
    'test_cfg': ((TestLoop,), set()),
    'optim_wrapper': ((OptimWrapper, AmpOptimWrapper), {'constructor', 'paramwise_cfg'}),
    'auto_scale_lr': ((), {'enable', 'base_batch_size'}),
    'log_processor': ((LogProcessor,), set()),
    'randomness': ((set_random_seed,), set()),
}
_REGISTRIES = [value for value in vars(registry).values() if isinstance(value, Registry)]
# How alike a name must be to be taken for another one misspelt, where any name may be right.
_ALIKE = 0.8


def merge_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Change settings of a config in place.

    Args:
        cfg: The config.
        options: Values by dotted keys, as ``model.backbone.window_size``; numbers index lists.

    Raises:
        UserError: If a key leads nowhere; the message names the nearest that does.
    """
    before = copy.deepcopy(cfg._cfg_dict)
    for key in options:
        _check_path(before, key)
    cfg.merge_from_dict(dict(options))
    for key in options:
        _check_key(before, cfg._cfg_dict, key.split('.'), cfg.get('default_scope') or 'mmengine')


def _check_path(node: Any, key: str) -> None:
    """Refuse what cannot be merged: settings of a number, an index beyond a list's end."""
    parts = key.split('.')
    for depth, part in enumerate(parts):
        place = '.'.join(parts[:depth])
        if isinstance(node, (list, tuple)):
            if not part.isdecimal() or int(part) >= len(node):
                raise UserError(
                    f'--cfg-options {key}: {place} is a list of {len(node)}; give a number below '
                    f'{len(node)} in the place of {part!r}'
                )
            node = node[int(part)]
        elif not isinstance(node, Mapping):
            raise UserError(
                f'--cfg-options {key}: {place} is {node!r} in the config and has no settings'
            )
        elif part not in node:
            return
        else:
            node = node[part]


def _check_key(before: Any, after: Any, parts: Sequence[str], scope: str) -> None:
    """Refuse a name that is new and that its reader does not know.

    Args:
        before: The config, or a part of it, without the options.
        after: The same with them: they may change a ``type``.
        parts: The key.
        scope: Of names of classes.
    """
    for depth, part in enumerate(parts):
        if part == '_delete_':  # has done its work
            return
        if isinstance(after, (list, tuple)):
            index = int(part)
            before = before[index] if isinstance(before, (list, tuple)) else {}
            after = after[index]
            continue
        if part not in before:
            known, closed = _known_names(after, parts[:depth], scope)
            names = (known | set(before)) - _RESERVED
            near = difflib.get_close_matches(part, names, 1, 0.6 if closed else _ALIKE)
            if part not in known and (closed or (known and near)):
                place = f'{".".join(parts[:depth])} has' if depth else 'there is'
                hint = (
                    f'did you mean {near[0]}?'
                    if near
                    else 'it may have ' + ', '.join(sorted(names))
                )
                raise UserError(f'--cfg-options {".".join(parts)}: {place} no {part!r}; {hint}')
        before, after = before.get(part, {}), after[part]
        if not isinstance(before, (Mapping, list, tuple)):
            before = {}


def _known_names(node: Mapping, place: Sequence[str], scope: str) -> tuple[set[str], bool]:
    """Names that the reader of a dict knows, and whether it knows no others."""
    if not place:
        return _parameters((Runner.__init__, FlexibleRunner.__init__))[0] | _ROOT, True
    builders, names = _BUILT.get('.'.join(place), ((), set()))
    kind = node.get('type')
    if kind is not None:
        builders = _classes(kind, scope) if isinstance(kind, str) else [kind]
    if not builders and (kind is not None or not names):
        return set(), False
    parameters, closed = _parameters(builders)
    return parameters | names | _RESERVED, closed


def _classes(name: str, scope: str) -> list[Callable]:
    """What goes by a name; no registry says which of them will be asked."""
    found = []
    for root in _REGISTRIES:
        with root.switch_scope_and_registry(scope) as entries:
            try:
                entry = entries.get(name)
            # It imports whatever defines the class; without that, nothing is known of it.
            except Exception:
                entry = None
        if entry is not None and entry not in found:
            found.append(entry)
    return found


def _parameters(functions: Collection[Callable]) -> tuple[set[str], bool]:
    """Names of the parameters of functions and classes, and whether there are no others.

    A class that passes ``**kwargs`` on has those of the classes above it as well.
    """
    names, closed = set(), True
    for function in functions:
        classes = inspect.getmro(function) if inspect.isclass(function) else ()
        for step in [vars(c)['__init__'] for c in classes if '__init__' in vars(c)] or [function]:
            try:
                parameters = inspect.signature(step).parameters.values()
            except (TypeError, ValueError):  # written in C
                return names, False
            names |= {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
            closed = False
    return names - {'self'}, closed
