"""Counts what a compiled step of GreenMIM moves, by the compiler's own books; nothing is run.

TorchInductor plans the kernels of backbone and decoder, forward and backward, and says which
buffers each of them reads and writes. No kernel is compiled, so that neither a GPU nor much time is
needed. Attention is the operator that PyTorch takes on CUDA. Loss and targets stay outside, as in
training.

Example:
    python tools/analysis/compiled_traffic.py --models greenmim-base greenmim-v2base-256
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

from greenmim_mm.cli.errors import Parser, errors_in_one_line


@dataclass(frozen=True)
class Graph:
    """One compiled graph: what its kernels read and write, and how many there are."""

    num_bytes: int
    kernels: int


class _Planned(Exception):
    """All is planned; the kernels would be run next."""


@contextmanager
def planned_graphs() -> Iterator[list[Graph]]:
    """Inside the block TorchInductor stops when it has planned its kernels, and notes them."""
    from torch._functorch import config as autograd
    from torch._inductor import config as inductor
    from torch._inductor.graph import GraphLowering
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import NopKernelSchedulerNode

    graphs: list[Graph] = []

    class Stop:
        @staticmethod
        def call(*args, **kwargs) -> None:
            raise _Planned

    def plan(graph: GraphLowering) -> Stop:
        graph.init_wrapper_code()
        graph._update_scheduler()
        # What takes one of several results out of a kernel is none.
        kernels = sum(
            not isinstance(node, NopKernelSchedulerNode) and not isinstance(node.node, MultiOutput)
            for node in graph.scheduler.nodes
        )
        graphs.append(Graph(graph.count_bytes()[0], kernels))
        return Stop()

    # What is not compiled must not be found in a cache, by anybody; and the backward pass, which
    # is compiled when it is run for the first time, is never run.
    settings = dict(enable_autograd_cache=False, force_non_lazy_backward_lowering=True)
    with (
        inductor.patch(fx_graph_cache=False),
        autograd.patch(**settings),
        patch.object(GraphLowering, 'compile_to_module', plan),
    ):
        yield graphs


def count(name: str, batch: int) -> dict[str, list[Graph]]:
    """Graphs of a candidate of the benchmark's, forward before backward, by part of the network."""
    import torch

    from greenmim_mm.benchmark.candidates import select
    from greenmim_mm.benchmark.traffic import kernels_of_cuda
    from greenmim_mm.ops import attention

    (candidate,) = select([name])
    torch.manual_seed(0)
    model = candidate.build(candidate).train()
    side = candidate.img_size
    images = torch.zeros(batch, 3, side, side)
    mask = model.mask(images)
    features = torch.zeros(batch, len(mask.visible_units), model.backbone.num_features[-1])
    inputs = {
        'backbone': (model.backbone, (images, mask)),
        'decoder': (model.neck, (features.requires_grad_(), mask, None, True)),
    }
    found = {}
    choose = attention._best_backend
    for part, (module, arguments) in inputs.items():
        torch._dynamo.reset()
        # The compiler decides about its backend by itself; the kernel is CUDA's.
        with planned_graphs() as graphs, kernels_of_cuda():
            with patch.object(attention, '_best_backend', choose):
                try:
                    torch.compile(module, dynamic=False)(*arguments)
                except _Planned:
                    pass
        found[part] = graphs
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool; bad input ends it with exit code 2 and one line on stderr."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=['greenmim-base'], metavar='NAME')
    parser.add_argument('--batch', type=int, default=256, metavar='N', help='default: 256')
    args = parser.parse_args(argv)
    print('| candidate | part | graphs | GB moved | kernels |\n|---|---|---|---|---|')
    with errors_in_one_line(parser, ValueError, ImportError):
        for name in args.models:
            for part, graphs in count(name, args.batch).items():
                moved = ' + '.join(f'{graph.num_bytes / 1e9:.1f}' for graph in graphs)
                kernels = ' + '.join(str(graph.kernels) for graph in graphs)
                print(f'| {name} | {part} | {len(graphs)} | {moved} | {kernels} |', flush=True)


if __name__ == '__main__':
    main()
