"""As `polygraphy run` does it: each exported part, in a session that Polygraphy opens, against its PyTorch module.

Inputs are drawn at random, so every input of a graph takes part, whatever a request would put there.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from engines.bundle.folder import Bundle
from engines.bundle.geometry import Geometry
from engines.bundle.kinds import ONNXRUNTIME
from engines.bundle.pages import page_size
from export.checkpoint.config import read_config
from export.checkpoint.folder import Checkpoint
from export.network.parts import module_of
from export.network.reference import load
from tests.geometries import tiny

# Polygraphy also works out relative errors, of the zeros that no cache has been written to yet, too.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide")

CAPACITY, BATCH = 128, 2
TOLERANCE = 2e-5  # float32 sums in another order; logits go up to 10
# part, new tokens, page budget: vision and pages have neither.
RUNS = {"vision": ("vision", 0, 0), "pages": ("pages", 0, 0), "prefill": ("decoder", 7, 0), "step": ("decoder", 1, 16)}
DISTURBED = {
    "vision": "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc2.weight",
    "pages": "model.layers.3.self_attn.k_proj_hd.weight",
    "prefill": "model.layers.2.self_attn.v_proj.weight",
    "step": "model.layers.0.mlp.up_proj.weight",
}


class Disturbed:
    """A checkpoint with one number of one weight moved."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.checkpoint, self.name = checkpoint, name

    def tensor(self, name: str) -> torch.Tensor:
        tensor = self.checkpoint.tensor(name)
        if name == self.name:
            tensor = tensor.clone()
            tensor.view(-1)[3] += 0.05
        return tensor


class ModuleRunner(BaseRunner):
    """A part of the model in PyTorch that takes and gives tensors by the names that its graph has for them."""

    def __init__(self, module: torch.nn.Module, described, layers: range) -> None:
        super().__init__(name="pytorch")
        self.module, self.described, self.layers = module, described, layers

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for spec in self.described.inputs:
            shape = [size if isinstance(size, int) else None for size in spec.shape]
            metadata.add(spec.name, dtype=np.dtype(spec.dtype), shape=shape)
        return metadata

    @torch.no_grad()
    def infer_impl(self, feed_dict) -> OrderedDict[str, np.ndarray]:
        given: OrderedDict[str, list | torch.Tensor] = OrderedDict()
        for name, array in feed_dict.items():
            base, _, layer = name.partition(".")
            tensor = torch.from_numpy(array)
            if layer:
                given.setdefault(base, []).append(tensor)  # a list of one for each layer, in order
            else:
                given[base] = tensor
        found = self.module(**{ARGUMENTS.get(name, name): value for name, value in given.items()})
        flat = []
        for value in found if isinstance(found, tuple) else (found,):
            flat += value if isinstance(value, list) else [value]
        names = [spec.name for spec in self.described.outputs]  # maps and hidden states come after them
        self.inference_time = 0.0
        return OrderedDict((name, np.ascontiguousarray(value)) for name, value in zip(names, flat, strict=False))


ARGUMENTS = {"hires_features": "tiles"}  # of PageProjector


def inputs_of(described, g: Geometry, steps: int, budget: int) -> OrderedDict[str, np.ndarray]:
    """Random inputs of a graph. The rows of a batch have pasts of different length and images at different places."""
    rng = np.random.default_rng(8)
    sizes = {"batch": BATCH, "steps": steps, "capacity": CAPACITY, "tiles": 3, "batch_tiles": BATCH * g.zoom**2}
    past = np.array([g.image_tokens + 12, g.image_tokens + 31])
    integers = {
        "input_ids": rng.integers(0, g.vocab, (BATCH, steps)), "past_length": past, "image_begin": np.array([3, 9]),
        "margins": np.array([[1, 0], [0, 2]]), "page_budget": np.full(BATCH, budget),
    }  # fmt: skip
    feed = OrderedDict()
    for spec in described.inputs:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)
        if spec.name in integers:
            feed[spec.name] = integers[spec.name].astype(np.int64)
            assert feed[spec.name].shape == shape
            continue
        feed[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        if spec.name.startswith("past_"):
            for row, used in zip(feed[spec.name], past, strict=True):
                row[:, used:] = 0  # nothing is there yet
    return feed


@pytest.fixture(scope="module")
def model(random_model):
    checkpoint, bundle = random_model("tiny", tiny())
    config = read_config(checkpoint)
    return config.geometry, Checkpoint.open(checkpoint, config.tower_folder), Bundle(bundle)


def compare(model, run: str, weights):
    """What Polygraphy says of a part in ONNX Runtime and in PyTorch with `weights`: (its verdict, all outputs)."""
    g, _, bundle = model
    part, steps, budget = RUNS[run]
    described = bundle.manifest.parts[part].graphs[ONNXRUNTIME]
    module = load(module_of(part, g, torch.float32), weights, torch.float32)
    runners = [
        ModuleRunner(module, described, range(g.layers)),
        OnnxrtRunner(SessionFromOnnx(str(bundle.graph(part, ONNXRUNTIME))), name="onnxruntime"),
    ]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run(runners, data_loader=[inputs_of(described, g, steps, budget)])
        assert Comparator.validate(results, check_inf=True, check_nan=True)
        accuracy = Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(atol=TOLERANCE, rtol=0))
    for _, iterations in results:  # Polygraphy compares what both have, and only warns of the rest
        assert [*iterations[0]] == [spec.name for spec in described.outputs]
    return accuracy, results


def verdicts(accuracy) -> dict[str, bool]:
    """Output -> whether it is equal enough."""
    (result,) = accuracy  # of one comparison
    ((_, iterations),) = result.items()  # of one pair of runners
    return {name: bool(result) for name, result in iterations[0].items()}


@pytest.mark.parametrize("run", RUNS)
def test_parts(model, run):
    g, checkpoint, _ = model
    accuracy, results = compare(model, run, checkpoint)
    found = verdicts(accuracy)
    assert bool(accuracy) and all(found.values()), found
    outputs = dict(results)["onnxruntime"][0]
    assert [*found] == [*outputs]
    if run == "step":  # pages were read, not the same of every row
        assert outputs["page_count"].min() > 0 and not np.array_equal(*outputs["pages"])
    if run == "prefill":
        assert not outputs["page_count"].any()
    if run == "pages":
        assert len(outputs) == 2 * len(g.reading_layers) and outputs["page_key.2"].shape[3] == page_size(g)


@pytest.mark.parametrize("run", RUNS)
def test_one_number_of_one_weight(model, run):
    """The comparison sees it, and sees it only behind that weight."""
    accuracy, _ = compare(model, run, Disturbed(model[1], DISTURBED[run]))
    found = verdicts(accuracy)
    assert not bool(accuracy) and not all(found.values())
    if run == "pages":
        assert [name for name, equal in found.items() if not equal] == ["page_key.3"]
    if run == "prefill":
        assert not found["logits"] and not found["present_value.2"] and found["present_value.1"]
