"""Learning rates that fall from layer to layer, for classifiers, detectors and segmentors alike."""

from itertools import groupby

from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ...registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, with learning rates that fall towards the image.

    A parameter of layer ``d`` out of ``n`` gets ``layer_decay_rate ** (n - 1 - d)`` times the rate
    that mmengine gives it. The layer is what ``model.backbone.get_layer_depth`` says; all that
    lies outside the backbone belongs to the last layer and keeps its rate.

    mmpretrain has such a constructor for its classifiers, mmdet one for ConvNeXt alone. This one
    needs neither, and unlike mmpretrain's it honours all of mmengine's ``paramwise_cfg``
    (``lr_mult``, ``bias_lr_mult``, ...).

    Args:
        optim_wrapper_cfg: Config of the optimiser wrapper, as in mmengine.
        paramwise_cfg: As in mmengine, and ``layer_decay_rate`` in (0, 1].

    Raises:
        ValueError: If ``layer_decay_rate`` is missing or outside (0, 1].
        TypeError: From the call, if the model has no backbone that knows its layers.

    Example:
        >>> optim_wrapper = dict(
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ...     constructor='greenmim_mm.LayerDecayOptimWrapperConstructor',
        ...     paramwise_cfg=dict(layer_decay_rate=0.9, norm_decay_mult=0.0),
        ... )
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(
                f'paramwise_cfg.layer_decay_rate={rate} must lie in (0, 1]; 1 is the same learning '
                'rate for all layers'
            )

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs) -> None:
        """Add a group for each parameter of a module and of those inside it.

        Args:
            params: Groups of parameters, extended in place.
            module: The module.
            prefix: Its place in the model; empty for the model itself.
            **kwargs: What mmengine hands on to the modules inside.
        """
        super().add_params(params, module, prefix, **kwargs)
        if not prefix:
            self._decay(params, module)

    def _decay(self, groups: list[dict], model: nn.Module) -> None:
        """Multiply the rate of each group, and log a line for each layer."""
        model = model.module if is_model_wrapper(model) else model
        backbone = getattr(model, 'backbone', None)
        if not hasattr(backbone, 'get_layer_depth'):
            raise TypeError(
                f'layer-wise decay: the backbone {type(backbone).__name__} does not say which '
                "layer a parameter belongs to (get_layer_depth); use type='greenmim_mm.GreenSwin' "
                "or 'greenmim_mm.GreenSwinV2'"
            )
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        rate = self.paramwise_cfg['layer_decay_rate']
        for group in groups:
            name = names[id(group['params'][0])]
            depth, num_layers = backbone.get_layer_depth(name, 'backbone.')
            group['lr_scale'] = rate ** (num_layers - 1 - depth)
            group['lr'] = group.get('lr', self.base_lr) * group['lr_scale']
            group['layer_id'] = depth

        logger = MMLogger.get_current_instance()
        by_layer = sorted(groups, key=lambda group: group['layer_id'])
        for layer, members in groupby(by_layer, key=lambda group: group['layer_id']):
            members = list(members)
            rates = sorted({group['lr'] for group in members})
            logger.info(
                f'layer {layer}: {len(members)} parameters, learning rate '
                + ', '.join(f'{value:.3g}' for value in rates)
            )
