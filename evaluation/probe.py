"""
A k-NN readout of a network in training, at regular steps (`--probe` of training/pretrain.py).

The script imports this module by its name, as a callback, so that `training/` does not depend on `evaluation/`. The probe uses the k-NN
readout, the data sets and the metric of segment.py, and therefore gives the same figure.
"""

import copy

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from evaluation.data import load_dataset
from evaluation.encoders import Encoder
from evaluation.engine import evaluate
from evaluation.readouts import KnnReadout
from evaluation.recipe import EvaluationRecipe
from evaluation.street_data import STREETS
from modeling_poodle import PoodleConfig, PoodleForSemanticSegmentation, PoodleModel


class Probe:
    """
    A k-NN readout that measures a network on one data set.

    Args:
        source: one of `STREETS`, or `folder:PATH` (images/, labels/, classes.json).

    Raises:
        ValueError: the source is unknown, or the folder does not hold such a data set.
    """

    def __init__(self, source: str):
        name, _, folder = source.partition(":")
        if source in STREETS:
            name, folder = source, ""
        elif not (name == "folder" and folder):
            raise ValueError(f"probe must be one of {', '.join(STREETS)}, or folder:PATH, got {source!r}")
        try:
            self.data = load_dataset(name, folder or None).with_groups()
            self.data.check()
        except ValueError as error:  # its message names a flag of the evaluation scripts
            raise ValueError(f"probe: {str(error).removeprefix('--data_dir ')}") from None
        self.recipe = EvaluationRecipe(model=["probe"], readout="knn", dataset=name, data_dir=folder or None)

    def __call__(self, accelerator: Accelerator, model: PoodleModel) -> dict[str, float]:
        """
        Measure `model`; with several processes, the model of the first, which is the one that is exported.

        The model keeps its training modes, and the run's random state is not changed.

        Returns:
            miou, accuracy, and the mean IoU of each group of classes that occurs, all from 0 to 1.
        """
        # In a teacher only the BatchNorms are in training mode.
        modes = [(module, module.training) for module in model.modules()]
        with torch.random.fork_rng():
            readout = KnnReadout(self._encoder(of_first_process(accelerator, model)), self.data, self.recipe)
            readout.prepare(accelerator)
            metric, _ = evaluate(accelerator, readout.predict, self.data)
        for module, training in modes:
            module.training = training
        result = metric.compute()
        figures = {"miou": result["miou"], "accuracy": result["accuracy"], **result["groups"]}
        return {name: value for name, value in figures.items() if value is not None}

    def _encoder(self, model: PoodleModel) -> Encoder:
        labels = {
            "id2label": dict(enumerate(self.data.classes)),
            "label2id": {c: k for k, c in enumerate(self.data.classes)},
        }
        config = PoodleConfig.from_dict({**model.config.to_dict(), **labels})
        with torch.device("meta"):  # only the classifier is left there, which k-NN does not use
            wrapper = PoodleForSemanticSegmentation(config)
        wrapper.poodle = model
        return Encoder("probe", wrapper, whole=True).eval().check()


def of_first_process(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """
    Return `model` with the buffers of the first process.

    On CPUs each process has its own BatchNorm statistics, and each measures a share of the test images. The given model keeps its buffers.
    The parameters, which are the same on all processes, are shared and not copied.
    """
    if accelerator.num_processes == 1:
        return model
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for buffer in twin.buffers():
        broadcast(buffer, from_process=0)
    return twin
