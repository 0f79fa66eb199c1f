"""What a runner of mmengine leaves behind in its process."""

import sys

MANAGERS = {
    'mmengine.logging': ('MessageHub', 'MMLogger'),
    'mmengine.registry': ('DefaultScope',),
    'mmengine.visualization': ('Visualizer',),
}


def forget_runs() -> None:
    """Drop logs, scope, seed and iteration, which would reach the masks of later runs.

    A logger also keeps the stream that it was made with, which ends with its test.
    """
    for module, names in MANAGERS.items():
        if module in sys.modules:
            for name in names:
                getattr(sys.modules[module], name)._instance_dict.clear()
