"""Cut with idap, recover with Lightning. Needs `pip install lightning`; ran with lightning 2.6.6 and torch 2.13.0.

python examples/lightning_recovery.py
"""

import copy

import lightning
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import idap
from idap.data import tensors
from idap.models import nets
from idap.training.distill import distillation_loss


class Classifier(lightning.LightningModule):
    """Train a network on labels, and on the logits of a teacher if there is one."""

    def __init__(self, net: nn.Module, teacher: nn.Module | None = None, lr: float = 0.05) -> None:
        super().__init__()
        self.net = net
        self.lr = lr
        self._teacher = [] if teacher is None else [teacher.eval()]  # in a list: not trained, not saved

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Give the loss of `(images, labels)`."""
        images, labels = batch
        logits = self.net(images)
        loss = F.cross_entropy(logits, labels)
        for teacher in self._teacher:
            with torch.no_grad():
                wanted = teacher(images)
            loss = (loss + distillation_loss(logits, wanted, temperature=2.0)) / 2
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD of the network's parameters, the small one's after the cut."""
        return torch.optim.SGD(self.net.parameters(), lr=self.lr, momentum=0.9)


def train(module: Classifier, batches: tensors.TensorLoader, epochs: int) -> None:
    """Run a Lightning trainer without files and bars."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    lightning.Trainer(max_epochs=epochs, accelerator="cpu", **quiet).fit(module, batches)


def main(epochs: int = 8) -> idap.Result:
    """Train, cut, recover, save."""
    lightning.seed_everything(0, verbose=False)
    digits = tensors.digits()
    task = idap.classification(digits.train, digits.val, num_classes=10, test=digits.test)
    original = Classifier(nets.DigitsResNet())
    train(original, digits.train, epochs)

    config = idap.Config(max_drop=None, macs=0.5, layers=idap.LayerStage(removals=0), recovery=idap.Recovery(epochs=0))
    result = idap.compress(original.net.eval(), task, config)  # cut; nothing is trained
    before = copy.deepcopy(result.model)
    train(Classifier(result.model, teacher=original.net, lr=0.02), digits.train, max(1, epochs // 2))
    idap.save("small-lightning", result.model.eval(), result.whole_plan)

    console = Console()
    for name, model in (("original", original.net), ("cut", before), ("recovered", result.model)):
        console.print(f"{name}: test accuracy {idap.evaluate(model, task, split='test'):.3f}")
    return result


if __name__ == "__main__":
    main()
