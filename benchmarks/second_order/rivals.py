"""Second-order methods of other packages, on plain DDP with their own defaults.

| row | package | what it is |
|---|---|---|
| kfac-rival | singd | SINGD in its K-FAC-like form: K-FAC whose factors are averaged over the ranks, without inverses |
| shampoo-rival | pytorch-optimizer | Shampoo in blocks, with grafting, on every rank alike |
| muon-rival | pytorch-optimizer | Muon whose matrices have owners, gathered after the update |
"""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..training.muon import ADAMW_SHARE, Together
from ..training.workloads import MissingPackage

Make = Callable[[Any, nn.Module, float], torch.optim.Optimizer | Together]


@dataclass(frozen=True)
class Rival:
    """An optimizer of another package."""

    package: str  # for pip
    module: str  # in which it is
    learning_rate: float
    make: Make  # of the module, a model and a learning rate

    def build(self, net: nn.Module, learning_rate: float | None) -> torch.optim.Optimizer | Together:
        """For this model. Raises MissingPackage."""
        try:
            module = importlib.import_module(self.module)
        except ImportError as error:
            raise MissingPackage(f"{self.package} cannot be imported ({error}): pip install {self.package}") from error
        return self.make(module, net, learning_rate or self.learning_rate)


def _kfac(module: Any, net: nn.Module, lr: float) -> Together:
    """Linear layers and convolutions; the rest by SGD with the same momentum."""
    served = [one for one in net.modules() if isinstance(one, (nn.Linear, nn.Conv2d))]
    own = [param for one in served for param in one.parameters(recurse=False)]
    rest = [param for param in net.parameters() if all(param is not each for each in own)]
    with warnings.catch_warnings():  # of what K-FAC's form leaves out
        warnings.simplefilter("ignore")
        first = module.SINGD(net, params=own, lr=lr, kfac_like=True, alpha1=0.0, warn_unsupported=False)
    return Together(first, torch.optim.SGD(rest, lr=lr, momentum=0.9)) if rest else Together(first)


def _shampoo(module: Any, net: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Its roots are taken every ten steps, as inverses of K-FAC are here, and not every thousand."""
    return module.ScalableShampoo(  # type: ignore[no-any-return]
        net.parameters(), lr=lr, start_preconditioning_step=10, preconditioning_compute_steps=10
    )


def _muon(module: Any, net: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The matrices that torch's Muon has beside it in training.muon, and the rest by its AdamW."""
    linear = [one.weight for one in net.modules() if isinstance(one, nn.Linear)][:-1]
    rest = [param for param in net.parameters() if all(param is not each for each in linear)]
    groups = [
        {"params": linear, "lr": lr, "use_muon": True},
        {"params": rest, "lr": lr * ADAMW_SHARE, "use_muon": False},
    ]
    return module.DistributedMuon(groups)  # type: ignore[no-any-return]


RIVALS = {
    "kfac-rival": Rival("singd", "singd.optim.optimizer", 0.001, _kfac),
    "shampoo-rival": Rival("pytorch-optimizer", "pytorch_optimizer", 0.05, _shampoo),
    "muon-rival": Rival("pytorch-optimizer", "pytorch_optimizer", 0.02, _muon),
}
