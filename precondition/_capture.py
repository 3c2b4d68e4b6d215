"""What layers see in a backward pass: their inputs and the gradients of their outputs.

Note [What counts]
A pass counts when its backward pass adds to the weight's ``.grad``: a forward pass without gradients or in eval mode
does not, nor does ``torch.autograd.grad`` of something else. Several passes before a step (accumulation, ``no_sync()``,
a layer that runs twice) each count. Under activation checkpointing a layer's forward pass runs twice and its output has
one gradient, so it counts once; its input is kept as autograd keeps it, and so is computed again with the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from precondition._layers import Layer

#: Takes a layer, its input and the gradient of its output, once for each pass that counts, on the thread of backward.
Sink = Callable[[Layer, Tensor, Tensor], None]
#: Takes a layer and its input in the forward pass, and returns what the sink gets in place of the input.
Reduce = Callable[[Layer, Tensor], Tensor]


class _Keep(torch.autograd.Function):
    """Keeps a tensor as autograd would: checkpointing and offloading may put it away, and a change of it is noticed."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None


class Capture:
    """Hooks on layers, which hand what they see to a sink.

    reduce: where the sink needs less than the input, this takes it out in the forward pass, and nothing else is kept.
    """

    def __init__(self, sink: Sink, reduce: Reduce | None = None) -> None:
        self._sink, self._reduce = sink, reduce
        self._handles: dict[Layer, Any] = {}
        self._accumulators: dict[Layer, tuple[Any, Any]] = {}  # with the type and the device of the weight
        self._anchor = torch.empty(0, requires_grad=True)
        #: Passes that begin while this is False do not count.
        self.enabled = True

    def watch(self, layers: Iterable[Layer]) -> None:
        """Watches these layers, and no others. What began before it still counts."""
        wanted = set(layers)
        for layer in self._handles.keys() - wanted:
            self._handles.pop(layer).remove()
        for layer in wanted - self._handles.keys():
            hook = outside_of_graphs(self._after_forward(layer))
            self._handles[layer] = layer.module.register_forward_hook(hook, with_kwargs=True)

    def release(self) -> None:
        """Takes the hooks off."""
        self.watch(())

    def _after_forward(self, layer: Layer) -> Callable[..., None]:
        def after(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not (self.enabled and module.training and isinstance(output, Tensor) and output.requires_grad):
                return
            if not layer.weight.requires_grad:  # frozen since
                return
            kept = self._kept(layer, args[0] if args else kwargs["input"])
            accumulator, shape = self._accumulator(layer), output.shape

            def before_backward(grad: Tensor) -> None:
                if _is_accumulated(accumulator):
                    with torch.no_grad():
                        own = grad if grad.shape == shape else grad.reshape(shape)
                        self._sink(layer, kept(), own.detach() if own.requires_grad else own)

            _in_front_of_changes(output).register_hook(before_backward)

        return after

    def _accumulator(self, layer: Layer) -> Any:
        """It stays the same one as long as the weight keeps its type and device."""
        kind = layer.weight.dtype, layer.weight.device
        known = self._accumulators.get(layer)
        if known is None or known[0] != kind:
            known = self._accumulators[layer] = kind, _accumulator(layer.weight)
        return known[1]

    def _kept(self, layer: Layer, x: Tensor) -> Callable[[], Tensor]:
        """What the sink will want of an input, in the backward pass."""
        if self._reduce is not None:
            with torch.no_grad():
                reduced = self._reduce(layer, x)
            return lambda: reduced
        kept: Any = _Keep.apply(self._anchor, x)  # the node lets go of what it has saved when its output is gone
        return lambda: kept.grad_fn.saved_tensors[0].detach()


def _in_front_of_changes(output: Tensor) -> Tensor:
    """The tensor whose hook sees the gradient of the output as the module made it. A linear layer may return a view of
    what it computed; were the view changed in place, as by an activation, its own hook would never run."""
    base = output._base
    if base is not None and base.is_contiguous() and output.is_contiguous() and base.numel() == output.numel():
        return base
    return output


def outside_of_graphs(hook: Callable[..., None]) -> Callable[..., None]:
    """The hook, which is never compiled. What keeps torch.compile off a function costs as much as such a hook itself,
    so it is asked for only where something is compiled."""
    apart = torch.compiler.disable(hook)

    def call(*args: Any) -> None:
        (apart if torch.compiler.is_compiling() else hook)(*args)

    return call


def _accumulator(weight: Tensor) -> Any:
    """What adds to ``weight.grad`` in a backward pass."""
    return get_gradient_edge(weight).node


def _is_accumulated(accumulator: Any) -> bool:
    """Whether the backward pass that runs now reaches it."""
    try:
        return bool(torch._C._will_engine_execute_node(accumulator))  # type: ignore[attr-defined]
    except RuntimeError:  # torch.autograd.grad() of this very weight
        return False
